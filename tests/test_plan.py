"""Every plan, on every target, is one that the device can run; and what is chosen where."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from perf.compiling import TARGETS, compile_plan
from perf.sass import disassemble, find_loop, parse, spills
from trigru.launch import compile_time
from trigru.plan import (
    DeviceLimits,
    LaunchPlan,
    NoPlan,
    candidates,
    clocks,
    pad_hidden,
    plan_launch,
    spread,
)

SIZES = (
    1, 7, 16, 17, 64, 65, 99, 100, 128, 129, 192, 224, 255, 256, 384, 480, 512, 640, 768, 1000,
    1024, 1536, 2048,
)  # fmt: skip
BATCHES = (1, 16, 33, 256, 4096, 10**7)
H100 = TARGETS[90]


def plan(limits: DeviceLimits = H100, **changes) -> LaunchPlan:
    shape = dict(B=16, H=1024, D=1, itemsize=2, backward=False, textbook=False)
    return plan_launch(limits, **(shape | changes))


def plans(sm: int, itemsize: int) -> Iterator[tuple[int, LaunchPlan]]:
    """All that a device is offered, with the batch that it is for."""
    for H, B, D, backward, textbook in product(SIZES, BATCHES, (1, 2), *[(False, True)] * 2):
        which = dict(itemsize=itemsize, backward=backward, textbook=textbook)
        for exact in (False, True)[: 1 + (itemsize == 4)]:
            for candidate in candidates(TARGETS[sm], B=B, H=H, D=D, exact=exact, **which):
                yield B, candidate


@functools.cache
def is_form(plan: LaunchPlan) -> bool:
    """The kernels' own form refuses what they cannot be, by an AssertionError."""
    return bool(compile_time(plan, exact=False))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sm", TARGETS)
def test_plans_fit_their_device(sm, itemsize):
    limits, regimes = TARGETS[sm], set()
    for B, plan in plans(sm, itemsize):
        programs, tiles, directions = plan.grid(B)
        regimes.add(plan.regime)
        assert plan.shared_bytes <= limits.shared_bytes
        assert (programs - 1) * plan.BLOCK_H < plan.H <= programs * plan.BLOCK_H  # none idles
        assert plan.row * plan.bits % 128 == 0 or plan.solo  # rows are whole vectors
        assert 1 <= plan.rows <= plan.BLOCK_B and 1 <= directions <= plan.D
        assert tiles <= min(65535, -(-B // plan.rows))  # CUDA's limit of a grid
        assert plan.num_warps <= 16
        assert is_form(replace(plan, rows=0, directions=0, batch_programs=0, D=1))
        if plan.solo:
            assert programs == 1
        else:
            assert programs * tiles * directions <= limits.sm_count  # all run at once
        # Every row of every direction has its turn, and there is no round for none.
        rounds, launches = plan.rounds(B), -(-plan.D // directions)
        at_once = plan.batch_programs * plan.rows
        assert (rounds // launches - 1) * at_once < B <= rounds // launches * at_once
    assert regimes == {"solo", "latency", "throughput"}


@pytest.mark.parametrize(
    ("sm", "itemsize", "largest"),
    [(90, 2, 2048), (90, 4, 1152), (80, 2, 1728), (80, 4, 1024), (86, 2, 1280), (120, 4, 640)],
)
def test_u_stays_on_chip_up_to(sm, itemsize, largest):
    def fits(H):
        try:
            for backward, textbook in product((False, True), (False, True)):
                plan(TARGETS[sm], H=H, D=2, itemsize=itemsize, backward=backward, textbook=textbook)
        except NoPlan:
            return False
        return True

    assert fits(largest) and not fits(2 * largest)


def test_regimes():
    assert plan(H=128).regime == "solo"
    assert plan(H=129).regime == "latency"
    assert plan(H=64, itemsize=4).regime == "solo"
    assert plan(H=65, itemsize=4).regime == "latency"
    assert plan(H=256, B=1024).regime == "throughput"
    assert plan(TARGETS[86], H=128).regime == "solo"


@pytest.mark.parametrize("H", [100, 129, 224, 384, 480, 768, 1000])
def test_units_are_not_padded_to_a_power_of_two(H):
    few = plan(H=H, B=1)
    if not few.solo:
        assert few.programs == -(-H // 16)
    for _, candidate in ((B, p) for B, p in plans(90, 2) if p.H == H and p.split):
        assert candidate.H_pad - H < 32 * candidate.num_warps  # K: a vector for each thread


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("H", [64, 128, 256, 512, 1024, 2048])
def test_a_batch_is_spread_before_tiles_are_widened(H, backward):
    assert plan(H=H, B=1, backward=backward).rows == 1
    few = plan(H=H, B=8, backward=backward)
    assert few.rows == -(-8 // min(8, 132 // few.programs)) and few.rounds(8) == 1


def test_rounds_are_of_even_size():
    narrow = next(p for p in candidates(H100, B=1, H=512, D=1, itemsize=2, backward=False,
                                        textbook=False) if p.BLOCK_B == 8)  # fmt: skip
    of_40 = spread(narrow, H100, 40)  # four groups: 8 rows and then 2 in two rounds, or twice 5
    assert (of_40.rows, of_40.rounds(40), of_40.grid(40)[1]) == (5, 2, 4)


def test_directions_share_a_launch_where_both_fit():
    assert plan(D=2).directions == 2
    assert plan(H=2048, D=2).directions == 1  # 128 programs each, on 132 SMs
    assert plan(H=2048, D=2).rounds(1) == 2


def test_batch_beyond_the_device_follows_in_the_same_launch():
    large = plan(B=4096)
    assert large.grid(4096)[1] == large.batch_programs < 4096 // large.BLOCK_B


@pytest.mark.parametrize("backward", [False, True])
def test_exact_products_leave_u_fewer_registers(backward):
    for H in (64, 512):
        tf32, exact = (plan(H=H, itemsize=4, backward=backward, exact=e) for e in (False, True))
        assert tf32.u_shared / tf32.chunks < exact.u_shared / exact.chunks
    assert plan(H=64) == plan(H=64, exact=True)  # which 16 bit is not


def test_the_least_clocks_are_chosen():
    for H, B, backward, textbook in product((128, 256, 512), BATCHES, *[(False, True)] * 2):
        which = dict(backward=backward, textbook=textbook)
        offered = list(candidates(H100, B=B, H=H, D=1, itemsize=2, **which))
        costs = [clocks(p, B, **which) for p in offered]
        assert plan(H=H, B=B, **which) == offered[costs.index(min(costs))]
        assert len(offered) > 1 and min(costs) > 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("H", [128, 256, 512, 1024])
def test_more_work_takes_more_clocks(H, backward):
    def step(plan, B=16, textbook=False):
        return clocks(plan, B, backward=backward, textbook=textbook)

    for p in candidates(H100, B=16, H=H, D=1, itemsize=2, backward=backward, textbook=False):
        assert step(p, B=16 * 132) == p.rounds(16 * 132) * step(p)  # the same tiles again
        assert p.solo or p.rounds(16 * 132) > 1
        assert step(p, textbook=True) > step(p)  # a sum more
        assert p.solo or step(replace(p, rows=2 * p.rows)) > step(p)  # bytes to wait for


def test_no_plan_says_why():
    with pytest.raises(NoPlan, match=r"compute capability 7\.5, the kernels need 8\.0"):
        plan(DeviceLimits("T4", (7, 5), 40, 64 * 1024))
    with pytest.raises(NoPlan, match=r"hidden size 8192 .* does not fit on chip: H100"):
        plan(H=8192)


def test_description_names_what_matters():
    text = plan().describe(16)
    assert "groups of 64 programs" in text and "128 programs of 8 warps" in text
    assert "16 of 1024 hidden units" in text and "in registers" in text and "KiB" in text
    assert "walks 8 batch rows at a time" in text
    assert "in registers and shared memory" in plan(H=2048).describe(16)
    assert "in shared memory" in plan(H=256, B=1024).describe(16)
    assert "16 of 1000 hidden units of U, padded to 1024 along K, in" in plan(H=1000).describe(16)
    assert "48 of 48 hidden units of U, padded to 64 along K, in" in plan(H=48).describe(16)
    assert not any("padded" in plan(H=H).describe(16) for H in (64, 1024))
    one = plan(H=64, B=1).describe(1)
    assert "one program per batch tile, 1 program of" in one and "1 batch row at a time" in one


EXACT = "exact"  # float32 whose products are not TF32's
# Where registers or shared memory are scarcest.
BORDERLINE = (  # sm, dtype, H, backward, textbook, rows, warps
    (80, torch.bfloat16, 64, True, False, 32, 8),
    (80, torch.bfloat16, 128, True, False, 16, 8),
    (90, torch.bfloat16, 128, True, False, 32, 16),
    (90, torch.bfloat16, 256, False, False, 32, 16),
    (90, torch.bfloat16, 256, True, False, 32, 8),
    (90, torch.bfloat16, 512, False, False, 64, 16),
    (90, torch.bfloat16, 512, True, False, 64, 8),
    (90, torch.bfloat16, 2048, True, True, 8, 8),
    (80, torch.bfloat16, 512, False, False, 64, 8),
    (90, torch.float32, 64, True, False, 16, 8),
    (90, EXACT, 64, False, False, 16, 4),
    (90, EXACT, 64, True, False, 16, 4),
    (90, EXACT, 1024, False, False, 8, 8),
    (90, EXACT, 512, True, False, 8, 8),
)


@pytest.mark.parametrize("case", BORDERLINE, ids=str)
def test_kernels_do_not_spill(case):
    sm, dtype, H, backward, textbook, *tile = case
    exact, which = dtype == EXACT, dict(backward=backward, textbook=textbook)
    dtype = torch.float32 if exact else dtype
    offered = candidates(
        TARGETS[sm], B=10**6, H=H, D=1, itemsize=dtype.itemsize, exact=exact, **which
    )
    alike = [p for p in offered if [p.BLOCK_B, p.num_warps] == tile]
    fullest = max(alike, key=lambda p: p.shared_bytes)
    compiled = compile_plan(sm, fullest, dtype, tf32=not exact, **which)
    assert spills(find_loop(*parse(disassemble(compiled.cubin)))) == 0
    assert 0 < compiled.shared_bytes <= fullest.shared_bytes


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("H_pad", [16, 32])
def test_u_is_padded_and_starts_where_a_vector_can(H_pad, offset):
    stored = torch.randn(offset + 2 * 48 * 16)
    w_hh = stored[offset:].view(2, 48, 16)
    padded = pad_hidden(w_hh, H_pad)
    assert padded.shape == (2, 3, H_pad, H_pad) and padded.data_ptr() % 16 == 0
    assert torch.equal(padded[..., :16, :16].reshape(w_hh.shape), w_hh)
    assert padded.count_nonzero() == w_hh.count_nonzero()
    copied = padded.data_ptr() != w_hh.data_ptr()
    assert copied == (H_pad > 16 or offset == 1)
