"""What test_floors.py checks, run where kernels are interpreted: see conftest's `interpreted`."""

import time

import torch
from concurrent_interpreter import Concurrently
from interpreted import POLLS, make_plan
from triton.runtime.interpreter import interpreter_builder

from perf import floor_kernels, floors
from trigru import launch
from trigru.exchange import unwritten

KERNEL, PUBLISH, SETTLE = (
    floor_kernels._exchange_kernel,
    floor_kernels.publish,
    floor_kernels.settle,
)
T, GROUPS, PROGRAMS, ROWS, H_PAD = 5, 2, 4, 3, 64
PUBLISHED, AWAITED = 1, 2


class Log:
    """Looks over the shoulder of every program. One of each group is late with all it publishes.

    events: what it did, in order; tiles: what it awaited, [group, program, wait, row, unit]."""

    def __init__(self, waits: int, BLOCK_K: int, barrier: bool):
        self.barrier = barrier
        self.events = torch.zeros(GROUPS, PROGRAMS, 4 * waits, dtype=torch.int8).share_memory_()
        self.tiles = torch.zeros(GROUPS, PROGRAMS, waits, ROWS, BLOCK_K).share_memory_()
        self.done = self.waited = 0  # by the program, in its own process

    def note(self, event: int) -> tuple[int, int]:
        program, group, _ = interpreter_builder.grid_idx
        self.events[group, program, self.done] = event
        self.done += 1
        return group, program

    def publish(self, ptrs, value, mask) -> None:
        if interpreter_builder.grid_idx[0] == 1:
            time.sleep(0.02)
        PUBLISH(ptrs, value, mask)
        self.note(PUBLISHED)

    def settle(self, peeked, *args):
        settled = SETTLE(peeked, *args)
        # After a barrier the first look must have found all of the tile.
        tile = torch.tensor((peeked if self.barrier else settled).handle.data)
        where = self.note(AWAITED)
        self.tiles[where][self.waited] = tile.flatten(0, -2).T[:ROWS].float()
        self.waited += 1
        return settled


def hand_over(dtype: torch.dtype, slices: int, plan, *, barrier: bool, missing=None):
    """Run the kernel over T steps: y [T, GROUPS, ROWS, slices, H_PAD] and the log."""
    log = Log(T * slices * H_PAD // plan.BLOCK_K, plan.BLOCK_K, barrier)
    floor_kernels.publish, floor_kernels.settle = log.publish, log.settle
    floor_kernels._exchange_kernel = Concurrently(KERNEL, missing)
    y = unwritten(T, GROUPS, ROWS, slices, H_PAD, like=torch.empty(0, dtype=dtype))
    exchange = floors.Exchange(
        "", PROGRAMS, GROUPS, ROWS, plan.BLOCK_H, plan.BLOCK_B, plan.BLOCK_K, H_PAD, slices, 1
    )
    arrived = torch.zeros(GROUPS, 32, dtype=torch.int32)
    floor_kernels.exchange_alone(y, arrived, exchange, plan, barrier)
    launch.raise_if_failed(y.device)
    if barrier:
        assert arrived[:, 0].tolist() == [PROGRAMS * T] * GROUPS
    return y, log


def exact(y: torch.Tensor, BLOCK_B: int) -> torch.Tensor:
    """What the kernel stores into y [T, groups, rows, slices, H_PAD]: a unit's own number, counted
    through all rows and groups, and one more for each tile."""
    t, group, row, s, h = torch.meshgrid(*map(torch.arange, y.shape), indexing="ij")
    return (group * BLOCK_B + row) * y.shape[-1] + h + t * y.shape[-2] + s


def right_values(dtype: torch.dtype, slices: int, BLOCK_K: int, *, barrier: bool) -> None:
    floor_kernels.wait_limit = lambda steps: POLLS
    plan = make_plan(H_PAD, BLOCK_K=BLOCK_K)
    y, log = hand_over(dtype, slices, plan, barrier=barrier)
    right = exact(y, plan.BLOCK_B)
    assert torch.equal(y.float(), right.float())
    chunks = slices * H_PAD // BLOCK_K
    once = [PUBLISHED] * slices + [AWAITED] * chunks
    for group in range(GROUPS):
        # All of the step's tiles, cut into chunks of units: [wait, row, unit]
        waits = right[:, group].reshape(T, ROWS, chunks, BLOCK_K).transpose(1, 2).flatten(0, 1)
        for program in range(PROGRAMS):
            assert log.events[group, program].tolist()[: T * len(once)] == once * T
            assert torch.equal(log.tiles[group, program], waits.float()), (group, program)


def missing_program_is_reported(*, barrier: bool) -> None:
    floor_kernels.wait_limit = lambda steps: 100
    plan = make_plan(H_PAD)
    try:
        hand_over(torch.float32, 1, plan, barrier=barrier, missing=(2, 1, 0))
    except launch.ExchangeTimeout:
        return
    raise AssertionError("no program noticed")
