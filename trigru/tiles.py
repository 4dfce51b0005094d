"""What both kernels do with steps and tiles: find their rows, load what they need, compute gates.
How tiles are laid out, and which of the three regimes a kernel is of, its `form.Form` says, which
all of these take. By what the state is multiplied is in `products`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .products import memory_k

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # as Triton 3.6 to 3.8 call it

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
def walks_forwards(d, HEADS: gl.constexpr, REVERSE: gl.constexpr, BIDIRECTIONAL: gl.constexpr):
    """Whether the d-th recurrence walks from the first step to the last, as a runtime value."""
    if BIDIRECTIONAL:
        return d // HEADS % 2 == 0
    elif REVERSE:
        return d < 0
    else:
        return d >= 0


# ------------------------------------------------------------------------------------------- resets
#
# A kernel has the resets as bits, 32 steps of its walk at a time: of [D, words, B], one word more
# than there are steps for. So a step loads nothing for them, and no address waits for what is
# loaded. Forward a step asks who is reset before the next one, backward who was before it: bit k of
# word w is of step 32 w + k there, of step 32 w + k − 1 here, and both want the bits 1 … 32.


@gluon.jit(do_not_specialize=["T", "B", "rows"],
           do_not_specialize_on_alignment=["resets_ptr", "words_ptr", "offsets_ptr"])  # fmt: skip
def _pack_resets_kernel(
    resets_ptr,  # [N, D]
    words_ptr,  # [D, words, B]
    offsets_ptr,  # [T + 1] or None
    T,
    B,
    rows,  # of a batch tile
    D: gl.constexpr,
    HEADS: gl.constexpr,
    REVERSE: gl.constexpr,
    BIDIRECTIONAL: gl.constexpr,
    AGAINST: gl.constexpr,  # the direction of the forward pass
    BLOCK: gl.constexpr,
):
    """One word of each sequence of a batch tile."""
    PACKED: gl.constexpr = offsets_ptr is not None
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    n = gl.arange(0, BLOCK, L)
    for d in range(gl.program_id(2), D, gl.num_programs(2)):
        forwards = walks_forwards(d, HEADS, REVERSE, BIDIRECTIONAL) != AGAINST
        words = words_ptr + (d.to(gl.int64) * gl.num_programs(0) + gl.program_id(0)) * B
        first_row = gl.program_id(1).to(gl.int64) * rows
        for row0 in range(first_row, B, gl.num_programs(1).to(gl.int64) * rows):
            steps = steps_of_tile(offsets_ptr, row0, T, PACKED)
            word = gl.zeros([BLOCK], gl.int32, L)
            for bit in range(32):
                step = 32 * gl.program_id(0) + bit - (1 if AGAINST else 0)
                t = gl.where(forwards, step, steps - 1 - step)
                row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
                mask = (n < gl.minimum(rows, running)) & (step >= 0) & (step < steps)
                is_reset = gl.load(resets_ptr + (row + n) * D + d, mask=mask, other=0) != 0
                word |= is_reset.to(gl.int32) << bit
            gl.store(words + row0 + n, word, mask=n < gl.minimum(rows, B - row0))


@gluon.jit
def resets_of_block(words_ptr, block, rows, B):
    """A tile's bits for the 32 steps from `block` on; rows: of the tile, [BLOCK_B].

    They are made of two words here, so that these are waited for here, and not in the time loop,
    where the same scoreboards are those of other loads."""
    words_ptr += (block // 32).to(gl.int64) * B
    return gl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, 1;", "=r,r,r",
        [gl.load(words_ptr + rows), gl.load(words_ptr + B + rows)], dtype=gl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def is_set(words, bit):
    return ((words >> bit) & 1) != 0


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
