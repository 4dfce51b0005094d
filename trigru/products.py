"""U on chip, and products by it: how K is ordered, where U lies, what tensor cores do, and the sum
of what was split. Which of the ways it is, a kernel's `form.Form` says, which all of these take."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .exchange import begin, settle

# ------------------------------------------------------------------------------------------- orders


@gluon.jit
def fragments_first(tile, FORM: gl.constexpr):
    """[SPLIT_K, BLOCK_H, K] of U, from memory's order of K to the products': where threads wait in
    fragments, 16 bytes of a row are a thread's B fragments of two MMAs. The order of a sum over K
    is free, if both operands have the same."""
    SHAPE: gl.constexpr = [FORM.SPLIT_K, FORM.BLOCK_H, FORM.K]
    if FORM.BITS == 16:  # m16n8k16: a thread holds k = 2c, 2c + 1, 2c + 8, 2c + 9
        tile = gl.reshape(tile, [FORM.SPLIT_K, FORM.BLOCK_H, FORM.K // 32, 4, 4, 2])
        tile = gl.permute(tile, [0, 1, 2, 4, 3, 5])
    else:  # m16n8k8: k = c, c + 4
        tile = gl.reshape(tile, [FORM.SPLIT_K, FORM.BLOCK_H, FORM.K // 16, 4, 4])
        tile = gl.permute(tile, [0, 1, 2, 4, 3])
    return gl.reshape(tile, SHAPE)


@gluon.jit
def memory_k(k, FORM: gl.constexpr):
    """Where in memory a product's k-th is, likewise."""
    if FORM.SPLIT_K > 1:
        if FORM.BITS == 16:
            low = ((k // 16) % 2) * 4 + ((k // 8) % 2) * 2 + k % 2
            k = (k // 32) * 32 + ((k % 8) // 2) * 8 + low
        else:
            k = (k // 16) * 16 + (k % 4) * 4 + ((k // 8) % 2) * 2 + (k // 4) % 2
    return k


@gluon.jit
def unit_of_row(m, FORM: gl.constexpr):
    """Which unit an accumulator's m-th row is: see `Form.out`."""
    if FORM.SPLIT_K == 1:
        m = (m // 16) * 16 + (m % 8) * 2 + (m // 8) % 2
    return m


# ------------------------------------------------------------------------------------------------ U


@gluon.jit
def load_u(u_ptr, unit0, FORM: gl.constexpr):
    """One gate's rows of U for the program's units: a tuple of CHUNKS operands over K, in registers
    as A fragments or in shared memory."""
    L: gl.constexpr = FORM.u_loaded
    part = gl.arange(0, FORM.SPLIT_K, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    unit = gl.arange(0, FORM.BLOCK_H, gl.SliceLayout(0, gl.SliceLayout(2, L)))
    k = gl.arange(0, FORM.K, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    offs = (unit0 + unit_of_row(unit, FORM))[None, :, None] * FORM.H_PAD
    offs += part[:, None, None] * FORM.K + k[None, None, :]  # [SPLIT_K, BLOCK_H, K]
    tiles = ()
    CHUNKS: gl.constexpr = FORM.CHUNKS
    for c in gl.static_range(CHUNKS):
        tile = gl.load(u_ptr + c * (FORM.H_PAD // FORM.CHUNKS) + offs)
        if FORM.SPLIT_K > 1:
            tile = fragments_first(tile, FORM)
        if not FORM.EXACT:
            tile = rounded(tile)
        if FORM.WGMMA:
            place = gl.allocate_shared_memory(tile.dtype, [1, FORM.BLOCK_H, FORM.K], FORM.u_shared)
            place.index(0).store(gl.reshape(tile, [FORM.BLOCK_H, FORM.K]))
            tile = place
        elif c >= CHUNKS - FORM.U_SHARED:
            tile = gl.allocate_shared_memory(
                tile.dtype, [FORM.SPLIT_K, FORM.BLOCK_H, FORM.K], FORM.u_shared, tile
            )
        else:
            tile = gl.convert_layout(tile, FORM.A)  # the same registers
        tiles = tiles + (tile,)
    return tiles


@gluon.jit
def load_us(u_ptr, unit0, FORM: gl.constexpr):
    """The three gates'; u_ptr: [3, H_PAD, H_PAD]."""
    SQUARE: gl.constexpr = FORM.H_PAD * FORM.H_PAD
    return (
        load_u(u_ptr, unit0, FORM),
        load_u(u_ptr + SQUARE, unit0, FORM),
        load_u(u_ptr + 2 * SQUARE, unit0, FORM),
    )


# ----------------------------------------------------------------------------------------- products


@gluon.jit
def rounded(x):
    """float32 as TF32, to nearest; the tensor cores would cut it off. 16-bit operands stay."""
    if x.dtype == gl.float32:
        x = gl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
        )
    return x


@gluon.jit
def finite(x):
    """x, but 0 for an infinity, which is multiplied once: parts of both signs would make NaN."""
    return gl.where(gl.abs(x) == float("inf"), 0.0, x)


@gluon.jit
def remainder(x, high):
    """What `rounded` took off x, as TF32; nothing of what it made an infinity."""
    return rounded(gl.where(gl.abs(high) == float("inf"), 0.0, x - high))


@gluon.jit
def opaque_zero():
    """0, but the compiler does not know. Else it makes the descriptors of all of U's tiles before
    the time loop and, having a hundred 64-bit values to keep, spills them; ptxas, which does know,
    makes each of a constant in the loop."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wgmma_wait(sums):
    waited = warpgroup_mma_wait(0, sums)
    if len(sums) == 1:
        waited = (waited,)
    return waited


@gluon.jit
def product_wgmma(us, tiles, stages, FORM: gl.constexpr):
    """By wgmma (sm_90), which reads U and the tile from shared memory by itself. Sums are 2-D."""
    sums = ()
    for g in gl.static_range(len(us)):
        sums = sums + (gl.full([FORM.BLOCK_H, FORM.BLOCK_B], 0.0, gl.float32, FORM.mma),)
    COUNT: gl.constexpr = len(us[0])
    if not FORM.SOLO:
        arrived, begun, ptrs, limit, error_ptr = tiles
    for c in gl.static_range(COUNT):
        if not FORM.SOLO:
            stages[c % len(stages)].store(gl.reshape(arrived, [FORM.K, FORM.BLOCK_B]))
            tile = stages[c % len(stages)]
            if c + len(begun) + 1 < COUNT:
                begun = begun + (begin(ptrs, c + len(begun) + 1, FORM),)
            # A product is waited for before the next barrier: after that, what it reads may be
            # stored to. The compiler's barriers alone would not do, which take it to have read.
            if c > 0:
                sums = wgmma_wait(sums)
            fence_async_shared()
        else:
            tile = tiles[c]
            if c == 0:  # all of solo's tiles have been stored to by now
                fence_async_shared()
        new = ()
        for g in gl.static_range(len(us)):
            new = new + (
                warpgroup_mma(us[g][c].index(opaque_zero()), tile, sums[g], is_async=True),
            )
        sums = new
        if not FORM.SOLO and c + 1 < COUNT:
            arrived = settle(begun[0], ptrs, limit, error_ptr, c + 1, FORM)
            begun = begun[1:]
    return wgmma_wait(sums)


@gluon.jit
def multiply(a, b, acc, FORM: gl.constexpr):
    """acc + a · b, of fragments."""
    if FORM.EXACT:  # by three TF32 products; what the fourth adds is on average below its rounding
        # Not kept over the time loop, which would take twice U's registers.
        a = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [a], dtype=gl.float32, is_pure=False, pack=1
        )
        a_high = rounded(a)
        b_high = rounded(b)
        acc = mma_v2(remainder(a, a_high), finite(b_high), acc, input_precision="tf32")
        acc = mma_v2(finite(a_high), remainder(b, b_high), acc, input_precision="tf32")
        acc = mma_v2(a_high, b_high, acc, input_precision="tf32")
    else:
        acc = mma_v2(a, rounded(b), acc, input_precision="tf32")
    return acc


@gluon.jit
def product_mma(us, tiles, stages, FORM: gl.constexpr):
    """By mma.sync: fragments of U and of the tile come from registers or from shared memory."""
    nil = gl.full([FORM.SPLIT_K, FORM.BLOCK_H, FORM.BLOCK_B], 0.0, gl.float32, FORM.mma)
    SLICE: gl.constexpr = min(FORM.SLICE_K, FORM.K)
    sums = ()
    for g in gl.static_range(len(us)):
        sums = sums + (nil,)
    COUNT: gl.constexpr = len(us[0])
    if FORM.STAGES > 0:
        arrived, begun, ptrs, limit, error_ptr = tiles
    for c in gl.static_range(COUNT):
        if FORM.STAGES > 0:
            stages[c % len(stages)].store(arrived)
            tile = stages[c % len(stages)]
            if c + len(begun) + 1 < COUNT:
                begun = begun + (begin(ptrs, c + len(begun) + 1, FORM),)
        elif FORM.SOLO:  # the shared memory that the state was published to
            tile = tiles[c].reshape([1, FORM.K, FORM.BLOCK_B])
        else:
            tile = tiles[c]
        if FORM.SPLIT_K > 1 or FORM.U_SHARED == 0:
            if FORM.SPLIT_K == 1:
                tile = tile.load(FORM.B)
            new = ()
            for g in gl.static_range(len(us)):
                u = us[g][c]
                if c % FORM.CHUNKS >= FORM.CHUNKS - FORM.U_SHARED:
                    u = u.load(FORM.A)
                if c > 0:  # a chain of its own: here is little parallel work
                    new = new + (sums[g] + multiply(u, tile, nil, FORM),)
                else:
                    new = new + (multiply(u, tile, sums[g], FORM),)
            sums = new
        else:  # slice by slice: the compiler would load all fragments first and spill them
            for s in gl.static_range(FORM.K // SLICE):
                b = tile.slice(SLICE * s, SLICE, dim=1).load(FORM.B)
                new = ()
                for g in gl.static_range(len(us)):
                    a = us[g][c].slice(SLICE * s, SLICE, dim=2).load(FORM.A)
                    if FORM.EXACT:  # tensor cores cut sums off: let no long chain of them add up
                        new = new + (sums[g] + multiply(a, b, nil, FORM),)
                    else:
                        new = new + (multiply(a, b, sums[g], FORM),)
                sums = new
        if FORM.STAGES > 0 and c + 1 < COUNT:
            arrived = settle(begun[0], ptrs, limit, error_ptr, c + 1, FORM)
            begun = begun[1:]
    return sums


@gluon.jit
def product(us, tiles, stages, parts, FORM: gl.constexpr):
    """For each of `us` (a tuple of operands over K) its product with `tiles`, as `await_tiles` gave
    them; [SPLIT_K, BLOCK_H, BLOCK_B], of which what is still to be summed is put into `parts`."""
    if FORM.WGMMA:
        sums = product_wgmma(us, tiles, stages, FORM)
    else:
        sums = product_mma(us, tiles, stages, FORM)
    if FORM.SPLIT_K > 1:
        for g in gl.static_range(len(sums)):
            parts[g].store(sums[g])
    return sums


@gluon.jit
def total(product, part, mask_h, FORM: gl.constexpr):
    """The sum over SPLIT_K's parts, [BLOCK_H, BLOCK_B]; for SPLIT_K = 1 the accumulator's rows by
    their units' names, nothing is moved."""
    if FORM.SPLIT_K > 1:  # the barrier before this load is the compiler's
        x = gl.sum(part.load(FORM.parts), axis=0)
    else:
        x = gl.reshape(product, [FORM.BLOCK_H // 16, 2, 8, FORM.BLOCK_B])
        x = gl.reshape(gl.permute(x, [0, 2, 1, 3]), [FORM.BLOCK_H, FORM.BLOCK_B])
        x = gl.convert_layout(x, FORM.out)
    if FORM.PADDING_SEEN:
        # U's padding is 0, and 0 times an infinite state would be NaN: keep it out of the state.
        x = gl.where(mask_h[:, None], x, 0.0)
    return x
