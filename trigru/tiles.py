"""What a program holds and how: the form of a kernel with its layouts, U on chip, products, sums.

A tile is 3-D, [SPLIT_K, units or K, rows], so that one body serves products that the warps split
along K and products that they do not. Three regimes, by two fields of `Form`:

latency     SPLIT_K = warps. 16 units a program, few rows. K is split over the warps, U lies in
            registers as A fragments, each thread waits in L2 for exactly its own B fragments.
solo        SOLO. One program has all of U. The state goes from registers through a double-buffered
            tile in shared memory to the next product; nothing is exchanged.
throughput  neither. Many units and rows a program. U lies in shared memory; an awaited tile is
            waited for by 16-byte vectors and staged through shared memory for all warps.
"""

from dataclasses import dataclass

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

# ----------------------------------------------------------------------------- the form of a kernel


def _powers(first: int, end: int) -> list[int]:
    """first, 2 first, 4 first, … below end."""
    return [first << i for i in range(max(end // first, 1).bit_length() - 1)]


def _swizzled(bits: int, K: int, order: list[int]) -> gl.SwizzledSharedLayout:
    """K contiguous, in vectors of 16 bytes: those of 8 rows, as ldmatrix reads them, lie in
    different banks."""
    per_phase = max(1, 1024 // (K * bits))
    return gl.SwizzledSharedLayout(128 // bits, per_phase, max(1, 8 // per_phase), order)


@dataclass(frozen=True)
class Form:
    """All that is fixed when a kernel is compiled: its tiles, its regime, and what follows."""

    H: int
    H_PAD: int  # H, padded to whole tiles along K
    BLOCK_H: int  # units of a program
    BLOCK_B: int  # rows of its tile
    WARPS: int
    BITS: int  # of an element
    SPLIT_K: int = 1  # parts of a sum over K, one for each warp; or 1
    CHUNKS: int = 1  # of the sum over K, each multiplied at once
    STAGES: int = 0  # tiles in shared memory that awaited chunks go through, by turns
    SOLO: bool = False
    U_SHARED: int = 0  # of the chunks, so many of the last have their U in shared memory
    WGMMA: bool = False  # products by wgmma, of sm_90; its tiles are 2-D, without SPLIT_K
    EXACT: bool = False  # float32 products to float32's accuracy, not to TF32's
    NEWER: bool = True  # sm_90 and later

    def __post_init__(self) -> None:
        split, shared = self.SPLIT_K > 1, self.U_SHARED > 0
        assert self.H <= self.H_PAD == self.K * self.SPLIT_K * self.CHUNKS
        assert self.BLOCK_H % 16 == 0 and self.BLOCK_B in (8, 16, 32, 64)
        assert self.BITS in (16, 32) and not (self.EXACT and self.BITS == 16)
        assert self.K & (self.K - 1) == 0 and self.K % self.LEAST_K == 0
        assert self.U_SHARED in ((0, self.CHUNKS) if not split else range(self.CHUNKS + 1))
        if split:
            assert self.SPLIT_K == self.WARPS and self.BLOCK_H == 16 and self.BLOCK_B <= 16
        if self.SOLO:
            assert self.BLOCK_H == self.H_PAD and self.CHUNKS == 1 and not split
        assert (self.STAGES > 1) == (not self.SOLO and not split) and self.STAGES != 1
        assert not self.STAGES or (shared and 4 * self.WARPS <= self.BLOCK_B)
        if self.WGMMA:
            assert shared and self.BITS == 16 and self.BLOCK_H % 64 == 0 and self.BLOCK_B >= 16

    K = property(lambda self: self.H_PAD // self.SPLIT_K // self.CHUNKS)  # of one product
    EXCHANGE = property(lambda self: not self.SOLO)
    # Whether padded units get where they are multiplied: solo's do, and the second of a pair.
    PADDING_SEEN = property(lambda self: self.H % self.BLOCK_H > 0 and (self.SOLO or self.ODD))
    ODD = property(lambda self: self.PAIRS and self.H % 2 == 1)
    # The rows of what a kernel exchanges have room for whole tiles.
    H_ROW = property(lambda self: self.H if self.SOLO else self.H_PAD)

    @property
    def LEAST_K(self) -> int:
        """What a chunk's K is a multiple of: a vector of fragments; a slice from shared memory."""
        if self.SPLIT_K > 1:
            return 512 // self.BITS
        return 16 if self.SOLO else self.SLICE_K

    SLICE_K = property(lambda self: 1024 // self.BITS)  # multiplied at once from shared memory

    # --- accumulators: the warps split K, or else the units, 16 each, and with what is left the rows
    along_units = property(lambda self: min(self.WARPS // self.SPLIT_K, self.BLOCK_H // 16))
    along_rows = property(lambda self: self.WARPS // self.SPLIT_K // self.along_units)

    @property
    def mma(self):
        if self.WGMMA:
            rows = self.BLOCK_B // self.along_rows
            return gl.NVMMADistributedLayout(
                [3, 0], [self.along_units, self.along_rows], [16, rows, 16]
            )
        warps = [self.SPLIT_K, self.along_units, self.along_rows]
        return gl.NVMMADistributedLayout([2, 0], warps, [1, 16, 8])

    A = property(lambda self: gl.DotOperandLayout(0, self.mma, 32 // self.BITS))
    B = property(lambda self: gl.DotOperandLayout(1, self.mma, 32 // self.BITS))

    # --- U

    @property
    def u_loaded(self):
        """[SPLIT_K, BLOCK_H, K], with K in memory's order: 16 bytes a thread where that can be."""
        if self.SPLIT_K > 1:
            # A fragments, once `fragments_first` has named K's parts anew: a thread has a whole
            # vector of rows m and m + 8, four threads a run of four vectors.
            vector, k = 128 // self.BITS, self.K
            registers = [[0, 0, i] for i in _powers(1, vector)] + [[0, 8, 0]]
            registers += [[0, 0, i] for i in _powers(4 * vector, k)]
            lanes = [[0, 0, i] for i in _powers(vector, 4 * vector)]
            lanes += [[0, m, 0] for m in (1, 2, 4)]
            warps = [[s, 0, 0] for s in _powers(1, self.SPLIT_K)]
            return gl.DistributedLinearLayout(
                registers, lanes, warps, [], [self.SPLIT_K, self.BLOCK_H, k]
            )
        if self.U_SHARED:
            return gl.BlockedLayout([1, 1, 128 // self.BITS], [1, 4, 8], [1, self.WARPS, 1], [2, 1, 0])
        return self.A

    @property
    def u_shared(self):
        if self.WGMMA:
            return gl.NVMMASharedLayout(128, 16, 2)
        return _swizzled(self.BITS, self.K, [2, 1, 0])

    # --- an awaited tile

    @property
    def waited(self):
        """A thread's own B fragments; or whole vectors, 128 bytes of a row by 8 lanes."""
        if self.SPLIT_K > 1 or (self.SOLO and not self.WGMMA):
            return self.B
        return gl.BlockedLayout([1, 128 // self.BITS, 1], [1, 8, 4], [1, 1, self.WARPS], [1, 2, 0])

    lanes_k = property(lambda self: 4 if self.SPLIT_K > 1 else 8)  # that share a row

    @property
    def VECTORS(self) -> int:
        """Of 16 bytes, that a thread waits for in one tile."""
        threads = 32 if self.SPLIT_K > 1 else 32 * self.WARPS
        return max(1, self.K * self.BLOCK_B * self.BITS // 128 // threads)

    PER_ROW = property(lambda self: max(1, self.K * self.BITS // 128 // self.lanes_k))  # of them
    VECTOR_STRIDE = property(lambda self: 16 * self.lanes_k)  # bytes from one to the next in a row
    TILE_STRIDE = property(lambda self: self.BITS // 8 * self.H_PAD // self.CHUNKS)  # bytes

    @property
    def stage(self):
        """K contiguous: 16-byte stores, ldmatrix (or wgmma) without transposing."""
        if self.WGMMA:
            return gl.NVMMASharedLayout(128, 16, 2, True)
        return _swizzled(self.BITS, self.K, [1, 2, 0])

    @property
    def state(self):
        """Solo's state, [K, rows], rows contiguous: stmatrix of accumulators, ldmatrix.trans of B
        fragments."""
        if self.WGMMA:  # stmatrix's rows, every other unit, meet in banks: up to 4 wavefronts for 1
            return gl.NVMMASharedLayout(min(128, 2 * self.BLOCK_B), 16, 2)
        # Which 16 bytes of 128 a unit's 8 rows lie in: its bits 1, 2 and bit 0 ^ bit 3. So neither
        # 8 units in a row, as ldmatrix reads them, nor every other of 16, as stmatrix writes them
        # (`unit_of_row`), meet in a bank.
        within = [[0, 1], [0, 2], [0, 4], [2, 0], [4, 0], [1, 0]]
        rows = [[0, n] for n in _powers(8, self.BLOCK_B)]
        units = [[9, 0]] + [[m, 0] for m in _powers(16, self.H_PAD)]
        return gl.SharedLinearLayout(within + rows + units)

    # --- the sum over SPLIT_K: through shared memory, to all parts of a sum in one thread

    @property
    def part(self):
        """[SPLIT_K, BLOCK_H, BLOCK_B], without bank conflicts."""
        if self.BLOCK_B == 8 or self.SPLIT_K == 1:
            return gl.SwizzledSharedLayout(2, 4, 4, [2, 1, 0])
        # 16 rows: units are 16 banks apart. Bits 1, 2, 3 of a unit move its rows by 8, 4, 2: by the
        # first, the 4 units × 8 rows of a store's half warp lie in all banks; by all three, the
        # 16 units × 2 rows of a load.
        within = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 8], [0, 4, 4]]
        return gl.SharedLinearLayout(
            [*within, [0, 8, 2], *([s, 0, 0] for s in _powers(1, self.SPLIT_K))]
        )

    @property
    def parts(self):
        return gl.BlockedLayout([self.SPLIT_K, 1, 1], [1, 16, 2], [1, 1, self.WARPS], [1, 2, 0])

    @property
    def out(self):
        """Of what belongs to the program's units, [BLOCK_H, BLOCK_B]: the sums, gates, states and
        all that is loaded and stored.

        SPLIT_K = 1: the accumulators' own registers, if row m of a warp's 16 is unit
        2 (m % 8) + m // 8 (`unit_of_row`). A thread, which holds rows m and m + 8, then has two
        neighbouring units: its loads and stores are of both at once."""
        if self.SPLIT_K > 1:
            return gl.SliceLayout(0, self.parts)
        if self.WGMMA:  # warps: units first; each warpgroup has a run of rows
            run = self.BLOCK_B // self.along_rows
            registers = [[0, n] for n in _powers(8, run)]
            warps = [[m, 0] for m in _powers(16, self.BLOCK_H)]
            warps += [[0, n] for n in _powers(run, self.BLOCK_B)]
        else:  # rows first, 8 by turns
            registers = [[0, n] for n in _powers(8 * self.along_rows, self.BLOCK_B)]
            warps = [[0, n] for n in _powers(8, 8 * self.along_rows)]
            warps += [[m, 0] for m in _powers(16, self.BLOCK_H)]
        lanes = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
        return gl.DistributedLinearLayout(
            [[1, 0], [0, 1], *registers], lanes, warps, [], [self.BLOCK_H, self.BLOCK_B]
        )

    PAIRS = property(lambda self: self.SPLIT_K == 1 and self.BITS == 16)  # neighbours, in `out`
    PER_WORD = property(lambda self: 2 if self.PAIRS and not self.ODD else 1)  # units of what is loaded

    @property
    def loaded(self):
        """Of what is loaded each step, [BLOCK_H / PER_WORD, BLOCK_B]: as `out`, but a pair of units
        is a word until it is used. Unpacked at once it would take two registers, and the
        instruction that unpacks it would wait for the load."""
        if self.PER_WORD == 1:
            return self.out

        def halved(bases):
            return [[m // 2, n] for m, n in bases]

        out = self.out
        return gl.DistributedLinearLayout(
            halved(out.reg_bases[1:]), halved(out.lane_bases), halved(out.warp_bases), [],
            [self.BLOCK_H // 2, self.BLOCK_B],
        )  # fmt: skip

    @property
    def ROW_BITS(self) -> int:
        """Of a row's number in `out`, the bits by which threads differ; the rows of one thread
        differ in the others."""
        if self.SPLIT_K > 1:
            return 2 * self.WARPS - 1
        if self.WGMMA:
            return 6 | (self.BLOCK_B - self.BLOCK_B // self.along_rows)
        return 6 | 8 * (self.along_rows - 1)


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
def own_offsets(unit, STRIDE_ROW: gl.constexpr, L: gl.constexpr, FORM: gl.constexpr):
    """[BLOCK_H, BLOCK_B] in layout L, of what belongs to the program's units, `unit` [BLOCK_H].

    Written so, and in 64 bits, a thread's addresses are found to be one and constants; else the
    compiler keeps each in two registers, and advances it, on its own (80 registers; spills)."""
    n = gl.arange(0, FORM.BLOCK_B, gl.SliceLayout(0, L)).to(gl.int64)
    of_thread = (n & FORM.ROW_BITS)[None, :] * STRIDE_ROW + unit[:, None]
    return of_thread + (n & ~FORM.ROW_BITS)[None, :] * STRIDE_ROW


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
    L: gl.constexpr = FORM.waited
    part = gl.arange(0, FORM.SPLIT_K, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    k = memory_k(gl.arange(0, FORM.K, gl.SliceLayout(0, gl.SliceLayout(2, L))), FORM)
    return rows[None, None, :] * STRIDE_ROW + (part[:, None, None] * FORM.K + k[None, :, None])


@gluon.jit
def fetch(ptrs, mask, FORM: gl.constexpr):
    """Load, [BLOCK_H / PER_WORD, BLOCK_B], what `unpacked` makes float32 of.

    What is masked stays undefined, which saves an instruction a load: nothing of rows that are not
    real gets anywhere. Of units that are not, where it does, it is 0."""
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
    longest for: of 16 bits, one reciprocal for two. 1 / u = v · (1 / u v)."""
    if FORM.SPLIT_K == 1 and FORM.BITS == 16:
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
    if FORM.SPLIT_K > 1 or FORM.BITS == 32:
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
def remainder(x, high):
    """What `rounded` took off x, as TF32; of an infinity, nothing."""
    return rounded(gl.where(x == high, 0.0, x - high))


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
        tiles = tiles + (tile,)  # noqa: RUF005
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
        sums = sums + (gl.full([FORM.BLOCK_H, FORM.BLOCK_B], 0.0, gl.float32, FORM.mma),)  # noqa: RUF005
    COUNT: gl.constexpr = len(us[0])
    if FORM.EXCHANGE:
        arrived, begun, ptrs, limit, error_ptr = tiles
    for c in gl.static_range(COUNT):
        if FORM.EXCHANGE:
            stages[c % len(stages)].store(gl.reshape(arrived, [FORM.K, FORM.BLOCK_B]))
            tile = stages[c % len(stages)]
            if c + len(begun) + 1 < COUNT:
                begun = begun + (begin(ptrs, c + len(begun) + 1, FORM),)  # noqa: RUF005
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
            new = new + (  # noqa: RUF005
                warpgroup_mma(us[g][c].index(opaque_zero()), tile, sums[g], is_async=True),
            )
        sums = new
        if FORM.EXCHANGE and c + 1 < COUNT:
            arrived = settle(begun[0], ptrs, limit, error_ptr, c + 1, FORM)
            begun = begun[1:]
    return wgmma_wait(sums)


@gluon.jit
def multiply(a, b, acc, FORM: gl.constexpr):
    """acc + a · b, of fragments."""
    if FORM.EXACT:  # by three TF32 products; what the fourth would add is below float32's rounding
        # Not kept over the time loop, which would take twice U's registers.
        a = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [a], dtype=gl.float32, is_pure=False, pack=1
        )
        a_high = rounded(a)
        b_high = rounded(b)
        # An infinity is multiplied once: parts of other signs would make NaN of it.
        b_finite = gl.where(gl.abs(b_high) == float("inf"), 0.0, b_high)
        acc = mma_v2(remainder(a, a_high), b_finite, acc, input_precision="tf32")
        acc = mma_v2(a_high, remainder(b, b_high), acc, input_precision="tf32")
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
        sums = sums + (nil,)  # noqa: RUF005
    COUNT: gl.constexpr = len(us[0])
    if FORM.STAGES > 0:
        arrived, begun, ptrs, limit, error_ptr = tiles
    for c in gl.static_range(COUNT):
        if FORM.STAGES > 0:
            stages[c % len(stages)].store(arrived)
            tile = stages[c % len(stages)]
            if c + len(begun) + 1 < COUNT:
                begun = begun + (begin(ptrs, c + len(begun) + 1, FORM),)  # noqa: RUF005
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
                    new = new + (sums[g] + multiply(u, tile, nil, FORM),)  # noqa: RUF005
                else:
                    new = new + (multiply(u, tile, sums[g], FORM),)  # noqa: RUF005
            sums = new
        else:  # slice by slice: the compiler would load all fragments first and spill them
            for s in gl.static_range(FORM.K // SLICE):
                b = tile.slice(SLICE * s, SLICE, dim=1).load(FORM.B)
                new = ()
                for g in gl.static_range(len(us)):
                    a = us[g][c].slice(SLICE * s, SLICE, dim=2).load(FORM.A)
                    new = new + (multiply(a, b, sums[g], FORM),)  # noqa: RUF005
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
        tiles = tiles + (gl.allocate_shared_memory(dtype, shape, layout),)  # noqa: RUF005
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
        nothing = nothing + (0,)  # noqa: RUF005
    if FORM.SPLIT_K == 1:
        parts = nothing
    if FORM.EXCHANGE:
        states = nothing
    if FORM.STAGES == 0:
        stages = nothing
    return parts, states, stages
