"""From a device's limits and a problem's shape to a launch: tiles, warps, grid, and why.

Two regimes. *Solo*: one program holds all of U and a batch tile, and nothing is exchanged. *Group*:
H_pad / BLOCK_H programs share U by rows and exchange the state of their batch tile every step. They
wait for each other, so all programs of a launch must run at once: one on each SM at the most.

Everything here is arithmetic on numbers read from the device; nothing is tried on it. The choice
between plans that fit is a rough model of clocks per step.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WARPS = 8
VECTOR_BYTES = 16  # what one load instruction of one thread moves at the most
MAX_SOLO_ROW_BYTES = 256  # of U: H up to 128 in 16 bit, 64 in 32 bit, where more would spill
MIN_CAPABILITY = (8, 0)  # tensor cores for bf16 and TF32

# The model's clocks: a rough guess at an H100, good enough to rank plans.
CLOCKS_EXCHANGE = 1400  # store to L2, and load from it, as seen by another SM
CLOCKS_CHUNK = 300  # each further load of a chunk of the operand
CLOCKS_STEP = 400  # gate arithmetic and what else a step costs whatever its size
SHARED_BYTES_PER_CLOCK = 128
L2_BYTES_PER_CLOCK = 48  # into one SM


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
    H_pad: int  # H, padded to whole tiles
    BLOCK_H: int  # hidden units of a program
    BLOCK_B: int  # batch rows of a program's tile
    BLOCK_K: int  # hidden units multiplied at once
    SPLIT_K: int  # parts that a product is split into, one for each warp
    num_warps: int
    spin: int  # elements of an exchanged tile that one thread waits for; 0: the interpreter's form
    solo: bool
    directions: int  # of the D, how many one launch computes
    batch_programs: int  # batch tiles that run at once; the rest follow in the same launch
    shared_bytes: int  # of a program, estimated from above

    @property
    def row(self) -> int:
        """Row length of the tensors that the kernel stores for itself or its group."""
        return self.H if self.solo else self.H_pad

    def grid(self, B: int) -> tuple[int, int, int]:
        tiles = -(-B // self.BLOCK_B)
        return self.H_pad // self.BLOCK_H, min(tiles, self.batch_programs), self.directions

    def describe(self, B: int) -> str:
        """The plan in a person's words."""
        groups, tiles, directions = self.grid(B)
        programs = groups * tiles * directions
        form = "one program per batch tile" if self.solo else f"groups of {groups} programs"
        return (
            f"{form}, {programs} program{'s' * (programs != 1)} of {self.num_warps} warps; each "
            f"keeps {self.BLOCK_H} of {self.H_pad} hidden units of U on chip "
            f"({self.shared_bytes / 1024:.0f} KiB of shared memory) and walks {self.BLOCK_B} batch "
            "rows at a time"
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
) -> LaunchPlan:
    """The plan with the least modelled time for a step of B rows. Raises `NoPlan` if none fits."""
    if limits.capability < MIN_CAPABILITY:
        have, need = ("{}.{}".format(*c) for c in (limits.capability, MIN_CAPABILITY))
        raise NoPlan(f"{limits.name} has compute capability {have}, the kernels need {need}")
    plans = [
        _group(limits, H, D, block_h, block_b, block_k, itemsize, textbook and not backward)
        for block_h in (16, 32, 64)
        for block_b in (16, 32, 64)
        for block_k in (128, 256, 512, 1024)
        # accumulators in registers
        if block_h * block_b <= (512 if backward or textbook or itemsize == 4 else 1024)
    ]
    if H * itemsize <= MAX_SOLO_ROW_BYTES:
        plans.append(_solo(limits, H, D, itemsize))
    fitting = [p for p in plans if p and p.shared_bytes <= limits.shared_bytes]
    if not fitting:
        raise NoPlan(
            f"U with hidden size {H} and {itemsize}-byte elements does not fit on chip: "
            f"{limits.name} has {limits.sm_count} SMs with {limits.shared_bytes // 1024} KiB each"
        )
    return min(fitting, key=lambda p: _clocks_per_step(p, B, itemsize, backward, textbook))


def _solo(limits: DeviceLimits, H: int, D: int, itemsize: int) -> LaunchPlan:
    H_pad = max(16, 1 << (H - 1).bit_length())
    block_b = 16  # the least that tensor cores take without waste
    # U, and up to four tiles: the operands of a step and what its layouts are changed in
    shared = itemsize * H_pad * (3 * H_pad + 4 * block_b)
    warps = min(MAX_WARPS, max(2, H_pad // 16))
    return LaunchPlan(
        H=H, D=D, H_pad=H_pad, BLOCK_H=H_pad, BLOCK_B=block_b, BLOCK_K=H_pad, SPLIT_K=1,
        num_warps=warps, spin=0, solo=True, directions=D,
        # Nobody waits, so a grid may be larger than the device; but then U would be loaded again.
        batch_programs=limits.sm_count * max(1, limits.shared_bytes // shared),
        shared_bytes=shared,
    )  # fmt: skip


def _group(
    limits: DeviceLimits, H: int, D: int, block_h: int, block_b: int, block_k: int, itemsize: int,
    two_waits: bool,
) -> LaunchPlan | None:  # fmt: skip
    H_pad = -(-H // block_k) * block_k
    programs = H_pad // block_h
    spin = block_k * block_b // (32 * MAX_WARPS)
    # Vectors that a thread waits for at once, bound by registers: compiled, more would spill.
    vectors = 8 if itemsize == 2 and block_h * block_b <= (256 if two_waits else 512) else 4
    if programs > limits.sm_count or spin * itemsize > vectors * VECTOR_BYTES:
        return None
    directions = min(D, limits.sm_count // programs)
    operand, parts = itemsize * block_k * block_b, 4 * MAX_WARPS * block_h * block_b
    return LaunchPlan(
        H=H, D=D, H_pad=H_pad, BLOCK_H=block_h, BLOCK_B=block_b, BLOCK_K=block_k,
        SPLIT_K=MAX_WARPS, num_warps=MAX_WARPS, spin=spin, solo=False, directions=directions,
        batch_programs=limits.sm_count // (programs * directions),
        shared_bytes=itemsize * 3 * block_h * H_pad + max(operand, parts),
    )  # fmt: skip


def _clocks_per_step(
    plan: LaunchPlan, B: int, itemsize: int, backward: bool, textbook: bool
) -> float:
    tiles = -(-B // plan.BLOCK_B)
    rounds = -(-tiles // plan.batch_programs) * -(-plan.D // plan.directions)
    clocks = CLOCKS_STEP + itemsize * 3 * plan.BLOCK_H * plan.H_pad / SHARED_BYTES_PER_CLOCK
    if not plan.solo:
        operands = 3 if backward else 2 if textbook else 1
        moved = operands * itemsize * plan.H_pad * plan.BLOCK_B
        clocks += CLOCKS_EXCHANGE * (2 if textbook else 1) + moved / L2_BYTES_PER_CLOCK
        clocks += CLOCKS_CHUNK * (operands * plan.H_pad // plan.BLOCK_K - 1)
    # Of equal plans, the one with the smaller tile wastes less on padded rows.
    return rounds * clocks + plan.BLOCK_B / 1024


def pad_hidden(w_hh: Tensor, H_pad: int) -> Tensor:
    """w_hh (D, 3H, H) as (D, 3, H_pad, H_pad), zeros in the padding; no copy if there is none, and
    it begins where a vector can."""
    D, _, H = w_hh.shape
    w = w_hh.view(D, 3, H, H)
    if H == H_pad and w.data_ptr() % VECTOR_BYTES == 0:
        return w
    return F.pad(w, (0, H_pad - H, 0, H_pad - H))
