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
    bits: int  # of an element
    H_pad: int  # H, padded to whole tiles along K
    BLOCK_H: int  # hidden units of a program
    BLOCK_B: int  # batch rows that its tile has room for
    rows: int  # batch rows of its tile
    num_warps: int
    directions: int  # of the D, how many one launch computes
    batch_programs: int  # batch tiles that run at once; the rest follow in the same launch
    split: bool = False  # the warps split the sum over K
    solo: bool = False
    chunks: int = 1
    stages: int = 0
    u_shared: int = 0
    wgmma: bool = False
    newer: bool = True

    @property
    def row(self) -> int:
        """Row length of the tensors that the kernel stores for itself or its group."""
        return self.H if self.solo else self.H_pad

    def grid(self, B: int) -> tuple[int, int, int]:
        tiles = -(-B // self.rows)
        return -(-self.H // self.BLOCK_H), min(tiles, self.batch_programs), self.directions


def latency(limits, H, D, bits, rows, warps, *, backward=False):
    least = 512 // bits
    K = -(-H // (least * warps)) * least
    chunk = K & -K
    if bits == 16: chunk = min(chunk, 128)
    programs = -(-H // 16)
    if programs > limits.sm_count: return None
    directions = min(D, limits.sm_count // programs)
    BLOCK_B = 8 if rows <= 8 else 16
    chunks = K // chunk
    u = 3 * 16 * K * bits // 1024
    t = (3 if backward else 1) * K * BLOCK_B * bits // 1024
    shared = 0
    if u + t > 150:
        chunk = min(chunk, 64); chunks = K // chunk
        while u + t > 150 and shared < chunks:
            shared += 1; u -= 3 * 16 * chunk * bits // 1024
    return LaunchPlan(H, D, bits, K * warps, 16, BLOCK_B, rows, warps, directions, limits.sm_count // (programs * directions),
        split=True, chunks=chunks, u_shared=shared, newer=limits.capability >= (9, 0))

def solo(limits, H, D, bits, rows, wgmma=False):
    H_pad = max(16, 1 << (H - 1).bit_length())
    BLOCK_B = max(8, 1 << (rows - 1).bit_length())
    return LaunchPlan(H, D, bits, H_pad, H_pad, BLOCK_B, rows, H_pad // 16, D, limits.sm_count, solo=True, u_shared=int(wgmma or (BLOCK_B > 16 and H_pad > 64)), wgmma=wgmma, newer=limits.capability >= (9, 0))

def throughput(limits, H, D, bits, rows, BLOCK_H, warps=8, wgmma=False, chunks=None):
    BLOCK_B = max(16, 1 << (rows - 1).bit_length())
    least = 64
    H_pad = -(-H // least) * least
    k = H_pad & -H_pad
    k = min(k, 256 if BLOCK_B <= 32 else 128)
    programs = -(-H // BLOCK_H)
    if programs > limits.sm_count: return None
    directions = min(D, limits.sm_count // programs)
    n = H_pad // k
    return LaunchPlan(H, D, bits, H_pad, BLOCK_H, BLOCK_B, rows, warps, directions, limits.sm_count // (programs * directions), chunks=n, stages=2, u_shared=n, wgmma=wgmma, newer=limits.capability >= (9, 0))


def plan_launch(limits, *, B, H, D, itemsize, backward, textbook):
    bits = 8 * itemsize
    if H * itemsize <= MAX_SOLO_ROW_BYTES:
        return solo(limits, H, D, bits, min(16, max(1, -(-B // limits.sm_count))))
    programs = -(-H // 16)
    groups = max(1, limits.sm_count // programs)
    rows = min(16, -(-B // groups))
    return latency(limits, H, D, bits, rows, 8 if rows > 8 or H > 512 else 4, backward=backward)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor contiguous, and where a vector can begin."""
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
