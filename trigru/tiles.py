"""What both kernels do with steps and tiles: find their rows, load U once, multiply by it, sum the
split products."""

import triton
import triton.language as tl

from .exchange import peek, settle


@triton.jit
def tanh(x):
    """tanh to a few ulp in float32; 2 σ(2x) − 1 alone would lose the small values' last digits.

    Below 0.55 it is x + x³ q(x²), q the Chebyshev fit of degree 4 to (tanh x − x) / x³."""
    s = x * x
    q = -0.006272607483 * s + 0.021070253104
    q = q * s - 0.053851865232
    q = q * s + 0.133325800300
    q = q * s - 0.333333164454
    size = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.55, x + x * s * q, tl.where(x < 0, -size, size))


@triton.jit
def rows_of_step(offsets_ptr, t, row0, T, B, PACKED: tl.constexpr):
    """Where the batch tile that starts at sequence `row0` lies in step t: the row of its first
    sequence, and how many sequences from this one on have the step; none outside of 0 … T − 1.

    Packed, the rows of step t are offsets[t] … offsets[t + 1], the longest sequence first."""
    inside = (t >= 0) & (t < T)
    if PACKED:
        first = tl.load(offsets_ptr + t, mask=inside, other=0)
        running = tl.load(offsets_ptr + t + 1, mask=inside, other=0) - first
    else:
        first = t * B
        running = tl.where(inside, B, 0)
    return first + row0, (running - row0).to(tl.int32)


@triton.jit
def steps_of_tile(offsets_ptr, row0, T, PACKED: tl.constexpr):
    """How many steps the batch tile that starts at sequence `row0` has: those of this sequence."""
    steps = T
    if PACKED:
        steps = tl.full([], 0, tl.int32)
        for start in range(0, T, 256):
            t = start + tl.arange(0, 256)
            _, running = rows_of_step(offsets_ptr, t, row0, T, 0, PACKED)
            steps += tl.sum((running > 0).to(tl.int32), axis=0)
    return steps


@triton.jit
def walks_forwards(d, REVERSE: tl.constexpr, BIDIRECTIONAL: tl.constexpr):
    """Whether the d-th recurrence walks from the first step to the last, as a runtime value."""
    if BIDIRECTIONAL:
        return d % 2 == 0
    elif REVERSE:
        return d < 0
    else:
        return d >= 0


@triton.jit
def operand(tile, PRECISION: tl.constexpr):
    """A float32 tile as TF32 products need it, rounded to nearest; the hardware would cut it off.
    Any other tile is left as it is."""
    if PRECISION == "tf32":
        tile = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1
        )
    return tile


@triton.jit
def offsets_k(BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """0 … BLOCK_K − 1 as [BLOCK_K], or cut into runs as [SPLIT_K, BLOCK_K // SPLIT_K]."""
    if SPLIT_K == 1:
        return tl.arange(0, BLOCK_K)
    else:
        runs: tl.constexpr = BLOCK_K // SPLIT_K
        return tl.arange(0, SPLIT_K)[:, None] * runs + tl.arange(0, runs)[None, :]


@triton.jit
def load_u(u_ptr, offs_h, stride_h: tl.constexpr, stride_k: tl.constexpr, K: tl.constexpr,
           BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The rows `offs_h` of one gate's U, as a tuple of K // BLOCK_K tiles.

    Loaded before the time loop and used only as a dot's operand inside it, each tile is placed in
    shared memory by the compiler and stays there."""
    tiles = ()
    offs_k = offsets_k(BLOCK_K, SPLIT_K)
    for c in tl.static_range(K // BLOCK_K):
        if SPLIT_K == 1:  # [BLOCK_H, BLOCK_K]
            offs = offs_h[:, None] * stride_h + (c * BLOCK_K + offs_k)[None, :] * stride_k
        else:  # [SPLIT_K, BLOCK_H, BLOCK_K // SPLIT_K]
            offs = offs_h[None, :, None] * stride_h + (c * BLOCK_K + offs_k)[:, None, :] * stride_k
        tiles = tiles + (operand(tl.load(u_ptr + offs), PRECISION),)  # type: ignore  # noqa: RUF005
    return tiles


@triton.jit
def operand_offsets(offs_b, stride_b: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """The right operand: [BLOCK_K, BLOCK_B] or [SPLIT_K, BLOCK_K // SPLIT_K, BLOCK_B]."""
    offs_k = offsets_k(BLOCK_K, SPLIT_K)
    if SPLIT_K == 1:
        return offs_b[None, :] * stride_b + offs_k[:, None]
    else:
        return offs_b[None, None, :] * stride_b + offs_k[:, :, None]


@triton.jit
def beside_operand(of_batch, SPLIT_K: tl.constexpr):
    """A [BLOCK_B] tensor, shaped to go with `operand_offsets`."""
    if SPLIT_K == 1:
        return of_batch[None, :]
    else:
        return of_batch[None, None, :]


@triton.jit
def zeros(BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT_K: tl.constexpr):
    """An accumulator for a product with U: [BLOCK_H, BLOCK_B], one for each part of a split K."""
    if SPLIT_K == 1:
        return tl.zeros([BLOCK_H, BLOCK_B], tl.float32)
    else:
        return tl.zeros([SPLIT_K, BLOCK_H, BLOCK_B], tl.float32)


@triton.jit
def add_product(acc, u, local, source, mask, deadline, error_ptr,
                 BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, SPIN: tl.constexpr,
                 SOLO: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + u · (the exchanged tiles at `source`, or the program's own tile `local`)."""
    if SOLO:
        acc = tl.dot(u[0], operand(local, PRECISION), acc, input_precision=PRECISION)
    else:
        ahead = peek(source, mask)
        for c in tl.static_range(CHUNKS):
            chunk = source + c * BLOCK_K
            tile = settle(ahead, chunk, mask, deadline, error_ptr, SPIN)
            if c + 1 < CHUNKS:  # in flight while this chunk is multiplied
                ahead = peek(chunk + BLOCK_K, mask)
            acc = tl.dot(u[c], operand(tile, PRECISION), acc, input_precision=PRECISION)
    return acc


@triton.jit
def total(acc, mask_h, SPLIT_K: tl.constexpr, PADDED: tl.constexpr):
    """The accumulator's sum over its parts, [BLOCK_H, BLOCK_B], 0 in the padded hidden units.

    Halving with `split` spreads the sum over the warps; `tl.sum` would leave it, and all that
    follows, replicated in each of them."""
    if SPLIT_K > 1:
        BLOCK_H: tl.constexpr = acc.shape[1]
        BLOCK_B: tl.constexpr = acc.shape[2]
        acc = tl.permute(acc, (1, 2, 0))
        if SPLIT_K >= 16:
            a, b = tl.split(tl.reshape(acc, [BLOCK_H, BLOCK_B, 8, 2]))
            acc = a + b
        if SPLIT_K >= 8:
            a, b = tl.split(tl.reshape(acc, [BLOCK_H, BLOCK_B, 4, 2]))
            acc = a + b
        if SPLIT_K >= 4:
            a, b = tl.split(tl.reshape(acc, [BLOCK_H, BLOCK_B, 2, 2]))
            acc = a + b
        a, b = tl.split(acc)
        acc = a + b
    if PADDED:
        # U's padding is 0, and 0 times an infinite state would be NaN: keep it out of the state.
        acc = tl.where(mask_h[:, None], acc, 0.0)
    return acc
