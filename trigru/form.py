"""The form of a kernel: its tiles, its regime, and every layout that follows from them.

A tile is 3-D, [SPLIT_K, units or K, rows], so that one body serves products that the warps split
along K and products that they do not. Three regimes, by two fields of `Form`:

latency     SPLIT_K = warps. 16 units a program, few rows. K is split over the warps, U lies in
            registers as A fragments, each thread waits in L2 for exactly its own B fragments.
solo        SOLO. One program has all of U. The state goes from registers through a double-buffered
            tile in shared memory to the next product; nothing is exchanged.
throughput  neither. Many units and rows a program. U lies in shared memory; an awaited tile is
            waited for by 16-byte vectors and staged through shared memory for all warps.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from triton.experimental.gluon import language as gl

# Triton's cache of kernels knows a form by its fields; what follows from them is in this file.
_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


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
    source: str = _SOURCE

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
        assert not self.STAGES or (shared and 16 * self.lanes_k <= self.K * self.BITS // 8)
        if self.WGMMA:
            assert shared and self.BITS == 16 and self.BLOCK_H % 64 == 0 and self.BLOCK_B >= 16

    K = property(lambda self: self.H_PAD // self.SPLIT_K // self.CHUNKS)  # of one product
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

    # --- accumulators: the warps split K, or the units, 16 each, and with what is left the rows
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
            return gl.BlockedLayout(
                [1, 1, 128 // self.BITS], [1, 4, 8], [1, self.WARPS, 1], [2, 1, 0]
            )
        return self.A

    @property
    def u_shared(self):
        if self.WGMMA:
            return gl.NVMMASharedLayout(128, 16, 2)
        return _swizzled(self.BITS, self.K, [2, 1, 0])

    # --- an awaited tile

    @property
    def waited(self):
        """A thread's own B fragments; or whole vectors, 128 bytes of a row by 8 lanes, and by as
        many warps as there are too many for 4 rows each."""
        if self.SPLIT_K > 1 or (self.SOLO and not self.WGMMA):
            return self.B
        warps = self.lanes_k // 8
        return gl.BlockedLayout(
            [1, 128 // self.BITS, 1], [1, 8, 4], [1, warps, self.WARPS // warps], [1, 2, 0]
        )

    @property
    def lanes_k(self) -> int:
        """Threads that share a row."""
        return 4 if self.SPLIT_K > 1 else 8 * max(1, 4 * self.WARPS // self.BLOCK_B)

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

    # How many warps hold the same elements of `out`.
    REPLICAS = property(
        lambda self: max(1, 2 * self.WARPS // self.BLOCK_B) if self.SPLIT_K > 1 else 1
    )
    PAIRS = property(lambda self: self.SPLIT_K == 1 and self.BITS == 16)  # neighbours, in `out`
    PER_WORD = property(
        lambda self: 2 if self.PAIRS and not self.ODD else 1
    )  # units of what is loaded

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


# Gluon is experimental. What layouts it has renamed must show when the library is imported, which
# then does without kernels, and not at the first launch.
for _form in (
    Form(16, 16, 16, 8, 1, 16, SOLO=True),
    Form(128, 128, 16, 8, 4, 16, SPLIT_K=4),
    Form(64, 64, 64, 16, 4, 16, STAGES=2, U_SHARED=1, WGMMA=True),
):
    for _layout in ("A", "B", "u_loaded", "u_shared", "waited", "stage", "state", "part", "out"):
        getattr(_form, _layout)
