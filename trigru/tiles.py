"""What both kernels do with steps and tiles: find their rows, keep U on chip, multiply by it, sum
what was split, compute gates. How tiles are laid out, and which of the three regimes a kernel is
of, its `form.Form` says, which all of these take."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .exchange import begin, settle

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # as Triton 3.6 to 3.8 call it

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


# ---------------------------------------------------------------------------------------- addresses


@gluon.jit
def own_units(unit0, PER_WORD: gl.constexpr, L: gl.constexpr, FORM: gl.constexpr):
    """The program's units in layout L, PER_WORD of them to an element, [BLOCK_H / PER_WORD], and
    the rows of its tile, [BLOCK_B]."""
    unit = gl.arange(0, FORM.BLOCK_H // PER_WORD, gl.SliceLayout(1, L))
    return unit0 + PER_WORD * unit, gl.arange(0, FORM.BLOCK_B, gl.SliceLayout(0, L))


@gluon.jit
def own_offsets(unit, STRIDE_ROW: gl.constexpr, L: gl.constexpr, FORM: gl.constexpr):
    """[BLOCK_H, BLOCK_B] in layout L, of what belongs to the program's units, `unit` [BLOCK_H].

    Written so, a thread's addresses are found to be one and constants; else the compiler keeps each
    in two registers, and advances it, on its own (80 registers; spills). The one is in 32 bits, and
    unsigned, so that its upper half is known to be 0 and takes no register."""
    n = gl.arange(0, FORM.BLOCK_B, gl.SliceLayout(0, L))
    # Not where products are exact: of those kernels ptxas then makes ones that spill.
    SHORT: gl.constexpr = STRIDE_ROW * FORM.BLOCK_B <= 2**32 and not FORM.EXACT
    of_thread = n & FORM.ROW_BITS if SHORT else (n & FORM.ROW_BITS).to(gl.int64)
    of_thread = of_thread[None, :] * STRIDE_ROW + unit[:, None]
    if SHORT:
        of_thread = of_thread.to(gl.uint32)
    return of_thread.to(gl.int64) + (n & ~FORM.ROW_BITS)[None, :].to(gl.int64) * STRIDE_ROW


@gluon.jit
def awaited_rows(last, FORM: gl.constexpr):
    """[BLOCK_B] of an awaited tile: 0 … last, and `last` again where the tile has no more rows, so
    that a wait masks nothing."""
    L: gl.constexpr = FORM.waited
    n = gl.arange(0, FORM.BLOCK_B, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    return gl.minimum(n, last)


@gluon.jit
def awaited_offsets(rows, STRIDE_ROW: gl.constexpr, FORM: gl.constexpr):
    """[SPLIT_K, K, BLOCK_B], of the first chunk of an awaited tile."""
    if STRIDE_ROW * FORM.BLOCK_B >= 2**31:
        rows = rows.to(gl.int64)
    L: gl.constexpr = FORM.waited
    part = gl.arange(0, FORM.SPLIT_K, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    k = memory_k(gl.arange(0, FORM.K, gl.SliceLayout(0, gl.SliceLayout(2, L))), FORM)
    return rows[None, None, :] * STRIDE_ROW + (part[:, None, None] * FORM.K + k[None, :, None])


@gluon.jit
def fetch(ptrs, mask, FORM: gl.constexpr):
    """Load, [BLOCK_H / PER_WORD, BLOCK_B], what `unpacked` makes float32 of.

    What is masked may be anything, since to ask for a 0 can cost an instruction a load: nothing of
    rows that are not real gets anywhere. Of units that are not, where it does, it is 0."""
    if FORM.PER_WORD == 2:
        ptrs = ptrs.to(gl.pointer_type(gl.int32), bitcast=True)
    if FORM.PADDING_SEEN:
        x = gl.load(ptrs, mask=mask, other=0)
    else:
        x = gl.load(ptrs, mask=mask)
    return x


@gluon.jit
def fetch3(ptrs, mask, STRIDE: gl.constexpr, FORM: gl.constexpr):
    return (
        fetch(ptrs, mask, FORM),
        fetch(ptrs + STRIDE, mask, FORM),
        fetch(ptrs + 2 * STRIDE, mask, FORM),
    )


@gluon.jit
def unpacked(x, dtype: gl.constexpr, FORM: gl.constexpr):
    """[BLOCK_H, BLOCK_B] float32 in `out` of what was fetched."""
    if FORM.PER_WORD == 2:
        HALVES: gl.constexpr = (
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;"
            if dtype == gl.bfloat16
            else "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }"
        )
        low, high = gl.inline_asm_elementwise(
            HALVES, "=r,=r,r", [x], dtype=[gl.float32, gl.float32], is_pure=True, pack=1
        )
        x = gl.permute(gl.join(low, high), [0, 2, 1])
        x = gl.convert_layout(gl.reshape(x, [FORM.BLOCK_H, FORM.BLOCK_B]), FORM.out)
    else:
        x = x.to(gl.float32)
    return x


# -------------------------------------------------------------------------------------------- steps


@gluon.jit
def rows_of_step(offsets_ptr, t, row0, T, B, PACKED: gl.constexpr):
    """Where the batch tile that starts at sequence `row0` lies in step t: the row of its first
    sequence, and how many sequences from this one on have the step; none outside of 0 … T − 1.

    Packed, the rows of step t are offsets[t] … offsets[t + 1], the longest sequence first."""
    inside = (t >= 0) & (t < T)
    if PACKED:
        first = gl.load(offsets_ptr + t, mask=inside, other=0)
        running = gl.load(offsets_ptr + t + 1, mask=inside, other=0) - first
    else:
        first = t.to(gl.int64) * B
        running = gl.where(inside, B, 0).to(gl.int64)
    return first + row0, (running - row0).to(gl.int32)


@gluon.jit
def steps_of_tile(offsets_ptr, row0, T, PACKED: gl.constexpr):
    """How many steps the batch tile that starts at sequence `row0` has: those of this sequence."""
    steps = T
    if PACKED:  # the first step that it does not have, by bisection: they are the longest first
        low = 0
        while low < steps:
            middle = (low + steps) // 2
            _, running = rows_of_step(offsets_ptr, middle, row0, T, 0, PACKED)
            if running > 0:
                low = middle + 1
            else:
                steps = middle
    return steps


@gluon.jit
def walks_forwards(d, REVERSE: gl.constexpr, BIDIRECTIONAL: gl.constexpr):
    """Whether the d-th recurrence walks from the first step to the last, as a runtime value."""
    if BIDIRECTIONAL:
        return d % 2 == 0
    elif REVERSE:
        return d < 0
    else:
        return d >= 0


# --------------------------------------------------------------------------------------- arithmetic


@gluon.jit
def ex2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def rcp(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def sigmoid(x):
    return rcp(1.0 + ex2(x * -1.4426950408889634))


@gluon.jit
def _exponential(x):
    """e⁻ˣ, at most 2⁶⁰; NaN stays."""
    asm: gl.constexpr = "min.NaN.f32 $0, $1, 0f42700000; ex2.approx.ftz.f32 $0, $0;"
    return gl.inline_asm_elementwise(
        asm, "=r,r", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _times(w, u):
    """w u, but 0 where it is below 2⁻⁵⁹; NaN stays."""
    asm: gl.constexpr = "fma.rn.f32 $0, $1, $2, 0fA2000000; max.NaN.f32 $0, $0, 0f00000000;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [w, u], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoids(x, y, FORM: gl.constexpr):
    """σ(x) and σ(y). With many elements a thread the special functions are what a step takes
    longest for: of 16 bits, one reciprocal for two, 1 / u = v · (1 / u v), right to three units in
    float32's last place. So a 1 may be 1 ± 2⁻²³, by which a state that is held for 10⁵ steps drifts
    by a hundredth of itself, about a rounding of its type."""
    if FORM.PAIRS:
        u = 1.0 + _exponential(x)
        v = 1.0 + _exponential(y)
        w = rcp(u * v)
        a = _times(w, v)
        b = _times(w, u)
    else:
        a = sigmoid(x)
        b = sigmoid(y)
    return a, b


@gluon.jit
def tanh(x, FORM: gl.constexpr):
    """1 − 2 / (1 + e²ˣ). Of 16 bits and many elements a thread that is enough, wrong by 2⁻²² at
    most. Else to a few ulp: below 0.55 it is x + x³ q(x²), q the Chebyshev fit of degree 4 to
    (tanh x − x) / x³."""
    large = 1.0 - 2.0 * rcp(1.0 + ex2(x * 2.8853900817779268))
    if not FORM.PAIRS:
        s = x * x
        q = -0.006272607483 * s + 0.021070253104
        q = q * s - 0.053851865232
        q = q * s + 0.133325800300
        q = q * s - 0.333333164454
        large = gl.where(gl.abs(x) < 0.55, x + x * s * q, large)
    return large


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


# ------------------------------------------------------------------------------------ shared memory


@gluon.jit
def _tiles(dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, COUNT: gl.constexpr):
    tiles = ()
    for _ in gl.static_range(COUNT):
        tiles = tiles + (gl.allocate_shared_memory(dtype, shape, layout),)
    return tiles


@gluon.jit
def shared_memory(dtype: gl.constexpr, SUMS: gl.constexpr, STATES: gl.constexpr,
                  FORM: gl.constexpr):  # fmt: skip
    """Parts of SUMS sums and STATES state tiles, both twice, for even and odd steps: then a step's
    one barrier is enough. And the stages of awaited chunks. Six zeros for what a regime has not."""
    PART: gl.constexpr = [FORM.SPLIT_K, FORM.BLOCK_H, FORM.BLOCK_B]
    STATE: gl.constexpr = [FORM.K, FORM.BLOCK_B]
    STAGE: gl.constexpr = [FORM.K, FORM.BLOCK_B] if FORM.WGMMA else [1, FORM.K, FORM.BLOCK_B]
    L_PART: gl.constexpr = FORM.part
    L_STATE: gl.constexpr = FORM.state
    L_STAGE: gl.constexpr = FORM.stage
    STAGES: gl.constexpr = FORM.STAGES
    parts = _tiles(gl.float32, PART, L_PART, 2 * SUMS if FORM.SPLIT_K > 1 else 0)
    states = _tiles(dtype, STATE, L_STATE, 2 * STATES if FORM.SOLO else 0)
    stages = _tiles(dtype, STAGE, L_STAGE, STAGES)
    nothing = ()
    for _ in gl.static_range(6):
        nothing = nothing + (0,)
    if FORM.SPLIT_K == 1:
        parts = nothing
    if not FORM.SOLO:
        states = nothing
    if FORM.STAGES == 0:
        stages = nothing
    return parts, states, stages
