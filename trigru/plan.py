"""From a device's limits and a problem's shape to a launch: tiles, warps, grid, and why.

Three regimes. *Solo*: one program holds all of U and a batch tile, and nothing is exchanged.
*Latency groups*: programs of 16 hidden units share U by rows and exchange the state of few batch
rows every step; their warps split the sum over K. *Throughput groups*: more units and rows a
program, U in shared memory. Programs of a group wait for each other, so all of a launch must run at
once: one on each SM at the most.

Everything here is arithmetic on numbers read from the device; nothing is tried on it. The choice
between plans that fit is a model of clocks per step, fitted to what the compiled kernels say.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VECTOR_BYTES = 16  # what one load instruction of one thread moves at the most
MAX_GRID = 65_535  # CUDA's limit, but along x
MIN_CAPABILITY = (8, 0)  # tensor cores for bf16 and TF32
MAX_SOLO_ROW_BYTES = 256  # of U: H up to 128 in 16 bit, 64 in 32 bit, where more would spill
# Of U and of an awaited tile together, what a thread of a latency group can hold in registers; what
# is over of U lies in shared memory.
HELD_REGISTERS = 150
HELD_IF_EXACT = 100  # the parts of what is multiplied take the rest

# The tiles to choose from: those that are the best ones somewhere.
SOLO_TILES = ((8,), (16,), (32,))  # rows
LATENCY_TILES = ((8, 4), (8, 8), (16, 8))  # rows, warps
THROUGHPUT_TILES = ((64, 16, 4), (64, 32, 8), (64, 64, 8), (128, 32, 8))  # units, rows, warps
NARROW_TILES = ((32, 32, 4), (32, 64, 8))  # where those have no room for U


class NoPlan(ValueError):
    """No launch fits this shape on this device; the message says why."""


@dataclass(frozen=True)
class DeviceLimits:
    """What a plan must know of a device."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_bytes: int  # the most that one program can have


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of a CUDA device, as its driver states them."""
    p = torch.cuda.get_device_properties(device)
    shared_bytes = p.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return DeviceLimits(p.name, (p.major, p.minor), p.multi_processor_count, shared_bytes)


@dataclass(frozen=True)
class LaunchPlan:
    """One launch of a persistent kernel. Sizes are in elements unless they say bytes."""

    H: int
    D: int  # recurrences side by side: the directions of a layer
    bits: int  # of an element
    H_pad: int  # H, padded to whole tiles along K
    BLOCK_H: int  # hidden units of a program
    BLOCK_B: int  # batch rows that its tile has room for
    num_warps: int
    shared_bytes: int  # of a program
    solo: bool = False
    split: bool = False  # the warps split the sum over K: a latency group
    chunks: int = 1  # of the sum over K, each multiplied at once
    stages: int = 0  # tiles in shared memory that awaited chunks go through, by turns
    u_shared: int = 0  # of the chunks, so many have U in shared memory; the others in registers
    wgmma: bool = False  # products by wgmma
    newer: bool = True  # sm_90 and later: the wait has an instruction for its test
    # How a batch is spread over the device: see `spread`.
    rows: int = 0  # batch rows of a program's tile
    directions: int = 0  # of the D, how many one launch computes
    batch_programs: int = 0  # batch tiles that run at once; the rest follow in the same launch

    @property
    def row(self) -> int:
        """Row length of the tensors that the kernel stores for itself or its group."""
        return self.H if self.solo else self.H_pad

    @property
    def programs(self) -> int:
        """That share U."""
        return -(-self.H // self.BLOCK_H)

    @property
    def regime(self) -> str:
        return "solo" if self.solo else "latency" if self.split else "throughput"

    def grid(self, B: int) -> tuple[int, int, int]:
        return self.programs, min(-(-B // self.rows), self.batch_programs), self.directions

    def rounds(self, B: int) -> int:
        """How often a step is repeated for the whole batch and all recurrences."""
        tiles = -(-B // self.rows)
        return -(-tiles // self.batch_programs) * -(-self.D // self.directions)

    def describe(self, B: int) -> str:
        """The plan in a person's words."""
        programs, tiles, directions = self.grid(B)
        count = programs * tiles * directions
        form = "one program per batch tile" if self.solo else f"groups of {programs} programs"
        where = {0: "registers", self.chunks: "shared memory"}.get(
            self.u_shared, "registers and shared memory"
        )
        padded = f", padded to {self.H_pad} along K," if self.H_pad > self.H else ""
        return (
            f"{form}, {count} program{'s' * (count != 1)} of {self.num_warps} warps; each keeps "
            f"{min(self.BLOCK_H, self.H)} of {self.H} hidden units of U{padded} in {where} "
            f"({self.shared_bytes / 1024:.0f} KiB of shared memory in all) and walks "
            f"{self.rows} batch row{'s' * (self.rows != 1)} at a time"
        )


def plan_launch(
    limits: DeviceLimits,
    *,
    B: int,
    H: int,
    D: int,
    itemsize: int,
    backward: bool,
    textbook: bool,
    exact: bool = False,
) -> LaunchPlan:
    """The plan with the least modelled time for a step of B rows; exact: of float32 products that
    are not rounded to TF32. Raises `NoPlan` if none fits."""
    if limits.capability < MIN_CAPABILITY:
        have, need = ("{}.{}".format(*c) for c in (limits.capability, MIN_CAPABILITY))
        raise NoPlan(f"{limits.name} has compute capability {have}, the kernels need {need}")
    which = {"backward": backward, "textbook": textbook}
    plans = list(candidates(limits, B=B, H=H, D=D, itemsize=itemsize, exact=exact, **which))
    if not plans:
        raise NoPlan(
            f"U with hidden size {H} and {itemsize}-byte elements does not fit on chip: "
            f"{limits.name} has {limits.sm_count} SMs with {limits.shared_bytes // 1024} KiB each"
        )
    return min(plans, key=lambda plan: clocks(plan, B, **which))


def candidates(
    limits: DeviceLimits,
    *,
    B: int,
    H: int,
    D: int,
    itemsize: int,
    backward: bool,
    textbook: bool,
    exact: bool = False,
) -> Iterator[LaunchPlan]:
    """All plans that this device can run."""
    wgmma = limits.capability[0] == 9 and itemsize == 2
    of = _Recurrence(H, D, itemsize, backward, textbook, exact and itemsize == 4, wgmma)

    def fitting(form: Callable, tiles: Iterable) -> list[LaunchPlan]:
        plans = (form(of, *tile) for tile in tiles)
        return [plan for plan in plans if plan and plan.shared_bytes <= limits.shared_bytes]

    if H * itemsize <= MAX_SOLO_ROW_BYTES:  # to wait for nobody is faster, whatever the batch
        plans = fitting(_solo, SOLO_TILES)
    else:
        plans = fitting(_latency, LATENCY_TILES)
        plans += fitting(_throughput, THROUGHPUT_TILES) or fitting(_throughput, NARROW_TILES)
    for plan in plans:
        if spread_plan := spread(plan, limits, B):
            yield spread_plan


def spread(plan: LaunchPlan, limits: DeviceLimits, B: int) -> LaunchPlan | None:
    """The plan for B rows: over all groups that the device has room for first, in wider tiles
    after. None if there is no room for one group."""
    if plan.programs > limits.sm_count:
        return None
    directions = min(plan.D, limits.sm_count // plan.programs)
    if plan.solo:  # nobody waits: a grid may be larger than the device
        directions = min(plan.D, MAX_GRID)
    at_once = max(1, limits.sm_count // (plan.programs * directions))
    rounds = max(1, -(-B // (at_once * plan.BLOCK_B)))
    rows = max(1, -(-B // (at_once * rounds)))
    return replace(
        plan, rows=rows, directions=directions, batch_programs=at_once,
        newer=limits.capability >= (9, 0),
    )  # fmt: skip


class _Recurrence(NamedTuple):
    """What a plan is for."""

    H: int
    D: int
    itemsize: int
    backward: bool
    textbook: bool
    exact: bool  # float32 products that are not rounded to TF32
    wgmma: bool  # what the device has


def _solo(of: _Recurrence, rows: int) -> LaunchPlan | None:
    H_pad = max(16, 1 << (of.H - 1).bit_length())  # sides of tiles are powers of two
    wgmma = of.wgmma and rows > 8 and H_pad >= 64
    # To split U into two TF32 parts takes registers: it would spill, hundreds of times a step.
    u_shared = wgmma or of.exact
    # 16 units and 8 rows a warp, as far as registers go: they hold U, but for wgmma. Parts of U are
    # made by each warp that multiplies by them.
    tiles = H_pad // 16 * rows // 8
    warps = min(tiles, H_pad // 16 if of.exact else 16 if wgmma else 8)
    if rows == 32 and not wgmma and (of.exact or H_pad * of.itemsize > 128):  # it would spill
        return None
    states = 3 if of.backward else 2 if of.textbook else 1
    shared = of.itemsize * H_pad * (2 * states * rows + 3 * H_pad * u_shared)
    return LaunchPlan(
        H=of.H, D=of.D, bits=8 * of.itemsize, H_pad=H_pad, BLOCK_H=H_pad, BLOCK_B=rows,
        num_warps=warps, shared_bytes=shared, solo=True, u_shared=int(u_shared), wgmma=wgmma,
    )  # fmt: skip


def _latency(of: _Recurrence, rows: int, warps: int) -> LaunchPlan | None:
    vector_k = 64 // of.itemsize  # of two MMAs: what a row's 16-byte vectors of four threads hold
    K = -(-of.H // (vector_k * warps)) * vector_k  # of one warp
    # Chunks are chains of products of their own: with few rows there are too few else.
    chunk = min(K & -K, (64 if rows == 8 else 128) * 2 // of.itemsize)
    tile = (3 if of.backward else 1) * of.itemsize * K * rows // 128  # registers of a thread
    u = 3 * of.itemsize * 16 * K // 128
    u_shared = 0
    if (over := u + tile - (HELD_IF_EXACT if of.exact else HELD_REGISTERS)) > 0:
        chunk = min(chunk, 128 // of.itemsize)
        u_shared = -(-over * K // (u * chunk))
    chunks = K // chunk
    if u_shared > chunks:
        return None
    sums = (2 if of.textbook else 1) if of.backward else 3
    shared = 4 * 2 * sums * warps * 16 * rows + 3 * of.itemsize * warps * 16 * chunk * u_shared
    return LaunchPlan(
        H=of.H, D=of.D, bits=8 * of.itemsize, H_pad=K * warps, BLOCK_H=16, BLOCK_B=rows,
        num_warps=warps, shared_bytes=shared, split=True, chunks=chunks, u_shared=u_shared,
    )  # fmt: skip


def _throughput(of: _Recurrence, block_h: int, rows: int, warps: int) -> LaunchPlan | None:
    slice_k = 128 // of.itemsize  # multiplied at once
    unit = max(slice_k, block_h)
    H_pad = -(-of.H // unit) * unit
    chunk = min(H_pad & -H_pad, 256, 8192 // rows)
    wgmma = of.wgmma and block_h >= 64
    if wgmma and not of.backward and block_h * rows > 2048:
        warps *= 2  # half the elements a thread; backward, where more is held, they would spill
    stages = 2
    shared = of.itemsize * (3 * block_h * H_pad + stages * chunk * rows)
    return LaunchPlan(
        H=of.H, D=of.D, bits=8 * of.itemsize, H_pad=H_pad, BLOCK_H=block_h, BLOCK_B=rows,
        num_warps=warps, shared_bytes=shared, chunks=H_pad // chunk, stages=stages,
        u_shared=H_pad // chunk, wgmma=wgmma,
    )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """What the parts of a step cost, in clocks of an H100: fitted to what perf.sass reads off the
    compiled kernels, so a model of a model. `python -m perf regret` says what it is good for."""

    phase: float  # a sum over all of h and the gates it is for, whatever their size
    wait: float  # a store until it can be seen, a load's way from L2, what is polled in vain
    kib: float  # 1024 bytes of what is waited for, from L2, some of them twice
    element: float  # the gates of 128 elements: those of one thread of each scheduler's warp
    product: float  # 16 × 8 × 16 of each scheduler by mma
    chain: float  # one of those, of 16 of K, that another one follows
    u_kib: float  # 1024 bytes of U that mma reads from shared memory
    stage: float  # a chunk through shared memory: two barriers, and the products wait for it


FORWARD = Costs(166, 800, 17.2, 73, 6.5, 16.6, 4.3, 319)
BACKWARD = Costs(87, 821, 14.4, 68, 9.5, 36, 5.4, 248)


def clocks(plan: LaunchPlan, B: int, *, backward: bool, textbook: bool) -> float:
    """The model's clocks for a step of the whole batch."""
    cost = BACKWARD if backward else FORWARD
    phases = 2 if textbook else 1
    tiles = 3 if backward else phases  # of [H_pad, rows], that a step waits for
    row_kib = plan.H_pad * plan.bits / 8 / 1024
    step = phases * cost.phase
    step += cost.element * max(plan.BLOCK_H * plan.BLOCK_B, 32 * plan.num_warps) / 128
    if not plan.wgmma:  # whose products hide behind all else
        k = plan.H_pad * plan.bits / 256  # in steps of a product
        step += cost.product * 3 * k * (plan.BLOCK_H / 16) * (plan.BLOCK_B / 8) / 4
        step += cost.u_kib * 3 * plan.BLOCK_H * row_kib * plan.u_shared / plan.chunks
        if plan.split:
            step += cost.chain * k / plan.num_warps
    if not plan.solo:
        step += phases * cost.wait + cost.kib * tiles * row_kib * plan.rows
    if plan.stages:
        step += cost.stage * tiles * plan.chunks
    return plan.rounds(B) * step


def aligned(tensor: Any) -> Any:
    """The tensor contiguous, and where a vector can begin; None as it is."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % VECTOR_BYTES == 0 else tensor.clone()


def pad_hidden(w_hh: Tensor, H_pad: int, *, transposed: bool = False) -> Tensor:
    """w_hh (D, 3H, H) as (D, 3, H_pad, H_pad), each gate transposed if asked for, zeros in the
    padding; no copy if there is nothing to do."""
    D, _, H = w_hh.shape
    w = w_hh.view(D, 3, H, H)
    if transposed:
        w = w.transpose(2, 3)
    if H != H_pad:
        w = F.pad(w, (0, H_pad - H, 0, H_pad - H))
    return aligned(w)
