"""Every plan, on every target, is one that the device can run: arithmetic, nothing compiled."""

from itertools import product

import pytest
import torch

from perf.compiling import TARGETS
from trigru.plan import DeviceLimits, NoPlan, pad_hidden, plan_launch

SIZES = (
    1,
    7,
    16,
    17,
    64,
    99,
    100,
    128,
    129,
    192,
    255,
    256,
    384,
    512,
    640,
    768,
    1000,
    1024,
    1536,
    2048,
)
BATCHES = (1, 16, 33, 256, 4096, 10**7)


def plans(limits, itemsize):
    for H, B, D, backward, textbook in product(
        SIZES, BATCHES, (1, 2), (False, True), (False, True)
    ):
        try:
            yield (
                B,
                plan_launch(
                    limits, B=B, H=H, D=D, itemsize=itemsize, backward=backward, textbook=textbook
                ),
            )
        except NoPlan:
            continue


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sm", TARGETS)
def test_plans_fit_their_device(sm, itemsize):
    limits = TARGETS[sm]
    for B, plan in plans(limits, itemsize):
        groups, tiles, directions = plan.grid(B)
        assert plan.shared_bytes <= limits.shared_bytes
        assert groups * plan.BLOCK_H == plan.H_pad >= plan.H
        assert plan.D % directions == 0
        assert tiles <= -(-B // plan.BLOCK_B) and tiles <= 65535  # CUDA's limit of a grid
        if plan.solo:
            assert groups == 1 and plan.BLOCK_K == plan.H_pad and plan.row == plan.H
        else:
            assert groups * tiles * directions <= limits.sm_count  # all run at once
            assert plan.H_pad % plan.BLOCK_K == 0 and plan.BLOCK_K % (16 * plan.SPLIT_K) == 0
            # a thread's share of the awaited tile is whole 16-byte vectors, and so are the rows
            assert plan.spin * 32 * plan.num_warps == plan.BLOCK_K * plan.BLOCK_B
            assert plan.spin * itemsize % 16 == 0 and plan.row * itemsize % 16 == 0


@pytest.mark.parametrize(
    ("sm", "itemsize", "largest"), [(90, 2, 2048), (90, 4, 1024), (80, 2, 1536), (80, 4, 768)]
)
def test_u_stays_on_chip_up_to(sm, itemsize, largest):
    def fits(H):
        try:
            for backward, textbook in product((False, True), (False, True)):
                plan_launch(
                    TARGETS[sm],
                    B=16,
                    H=H,
                    D=2,
                    itemsize=itemsize,
                    backward=backward,
                    textbook=textbook,
                )
        except NoPlan:
            return False
        return True

    assert fits(largest) and not fits(2 * largest)


def plan(limits, **changes):
    shape = dict(B=16, H=1024, D=1, itemsize=2, backward=False, textbook=False)
    return plan_launch(limits, **(shape | changes))


def test_regimes():
    assert plan(TARGETS[90], H=128).solo
    assert not plan(TARGETS[90], H=129).solo
    assert plan(TARGETS[90], H=64, itemsize=4).solo
    assert not plan(TARGETS[90], H=65, itemsize=4).solo
    assert not plan(TARGETS[86], H=128).solo  # U takes all of its 99 KiB


def test_directions_share_a_launch_where_both_fit():
    assert plan(TARGETS[90], D=2).directions == 2
    assert plan(TARGETS[90], H=2048, D=2).directions == 1  # 128 programs each, on 132 SMs


def test_batch_beyond_the_device_follows_in_the_same_launch():
    large = plan(TARGETS[90], B=4096)
    assert large.grid(4096)[1] == large.batch_programs < 4096 // large.BLOCK_B


def test_no_plan_says_why():
    with pytest.raises(NoPlan, match=r"compute capability 7\.5, the kernels need 8\.0"):
        plan(DeviceLimits("T4", (7, 5), 40, 64 * 1024))
    with pytest.raises(NoPlan, match=r"hidden size 8192 .* does not fit on chip: H100"):
        plan(TARGETS[90], H=8192)


def test_description_names_what_matters():
    text = plan(TARGETS[90]).describe(16)
    assert "groups of 64 programs" in text and "64 programs of 8 warps" in text
    assert "16 of 1024 hidden units" in text and "KiB" in text
    assert "one program per batch tile" in plan(TARGETS[90], H=64).describe(16)


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
