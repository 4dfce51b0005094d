"""The named sets of shapes that `python -m perf sweep` measures."""

import random
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

VARIANTS = ("torch", "textbook")
MODES = ("forward", "training")


class Case(NamedTuple):
    """One GRU to measure. T steps, B rows, input size I and hidden size H are in elements."""

    variant: str  # "torch" or "textbook"
    dtype: str  # "bf16", "fp16" or "fp32"
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    directions: int = 1
    packed: bool = False  # a PackedSequence, whose longest row has T steps

    def lengths(self) -> list[int]:
        """The steps of each row, the longest first. Packed, all lengths up to T are as likely, the
        same for the same case."""
        if not self.packed:
            return [self.T] * self.B
        draw = random.Random(0)
        return sorted([self.T, *(draw.randint(1, self.T) for _ in range(self.B - 1))], reverse=True)


def smoke() -> Iterator[Case]:
    """Small shapes that a CPU gets through within a minute."""
    for variant, T, H, B in product(VARIANTS, (16, 64), (32, 64, 128), (1, 16)):
        yield Case(variant, "fp32", T, B, I=H, H=H)


# What people run: B, T, the H of those who do, layers, directions, packed. Each H is there where it
# is used, not everywhere: with 1056 rows of 1000 steps and H = 2048, or 10,000 steps of an eager
# loop, the sweep's time and the device's memory would go into what nobody does.
WORKLOADS = (
    (4096, 24, (64, 256, 512), 1, 1, False),  # PPO with thousands of simulated robots (rsl_rl)
    (1024, 32, (512,), 1, 1, False),  # PPO in games (sample-factory)
    (128, 128, (64, 100, 128, 192), 1, 1, False),  # models of neurons (LFADS); TorchRL, MAPPO
    (16, 64, (256, 512, 1024, 2048), 1, 1, False),  # world models (the DreamerV3 family)
    (1, 1, (256, 384, 512), 1, 1, False),  # one step a call: speech in real time, WaveRNN, acting
    (256, 100, (100, 128, 512), 1, 1, True),  # sessions of a shop's visitors (GRU4Rec, DIEN)
    (1056, 1000, (16, 128), 1, 1, False),  # speech, a row for each band (GTCRN), and wider ones
    (128, 2000, (128,), 1, 2, False),  # sound events (DESED)
    (128, 2000, (256,), 1, 1, False),  # speech (DeepFilterNet)
    (32, 1375, (512,), 1, 1, False),  # WaveRNN in training
    (8, 2048, (512, 1024), 1, 1, False),  # few long rows
    (128, 2000, (384,), 3, 1, False),  # RNNoise in training
    (1, 16384, (256, 384), 1, 1, False),  # a whole recording at once (DeepFilterNet, RNNoise)
    (100, 10000, (128,), 2, 2, False),  # nanopore reads (medaka)
)
TEXTBOOK_ROWS = (16, 128)  # those of the workloads that models of neurons and world models have

HIDDEN = (64, 128, 256, 512, 1024, 2048)
# GRU4Rec's and LFADS' 100, RNNoise's 384, the largest that cuDNN's kernels for small H take (192),
# and others that pad: to 256, 512 and 1024.
HIDDEN_BETWEEN = (100, 192, 224, 384, 480, 768)
BATCH, COARSE = (1, 8, 16, 32, 64, 128, 256), (1, 16, 64, 256)


def workloads(variant: str, dtype: str) -> Iterator[Case]:
    """What people run in this variant and dtype: the textbook form only where an eager loop, its
    yardstick, is done in time."""
    for B, T, hidden, layers, directions, packed in WORKLOADS:
        if variant == "torch" or (B in TEXTBOOK_ROWS and T <= 128):
            for H in hidden:
                yield Case(variant, dtype, T, B, H, H, layers, directions, packed)


def grid(variant: str, dtype: str) -> Iterator[Case]:
    """One layer of every size at T = 512; at H = 512 other lengths; layers and directions."""
    for H, B in product(HIDDEN, BATCH):
        yield Case(variant, dtype, 512, B, H, H)
    for H, B in product(HIDDEN_BETWEEN, COARSE):
        yield Case(variant, dtype, 512, B, H, H)
    for T, B in product((16, 64, 2048), BATCH):
        yield Case(variant, dtype, T, B, 512, 512)
    for layers, directions in ((2, 1), (4, 1), (1, 2)):
        for H, B in product((256, 512, 1024), (16, 64)):
            yield Case(variant, dtype, 512, B, H, H, layers, directions)


def core() -> list[Case]:
    """The shapes for a GPU: what people run, and a grid around it, up to two rounds away.

    Those that say most come first, so that a sweep that is cut off has a coarse picture of all.
    Within a round come first those where TriGRU is likeliest to lose, so that it is not the losses
    that are cut off; last what takes long."""
    cases = dict.fromkeys(
        case
        for variant, dtype in product(VARIANTS, ("bf16", "fp32", "fp16"))
        for source in (workloads, grid)
        for case in source(variant, dtype)
        if dtype != "fp16" or source is grid
    )
    cases |= dict.fromkeys(Case(variant, "bf16", 64, 64, 256, 256) for variant in VARIANTS)
    near = [case for case in cases if rounds(case) <= 2]

    def place(case: Case) -> tuple[int, ...]:
        return rounds(case), joined_by_peers(case), asks_cudnn(case), case.T > 8192, -odds(case)

    return sorted(near, key=place)


def default() -> list[Case]:
    """The first round of `core`, within five minutes."""
    return [case for case in core() if rounds(case) == 0]


def rounds(case: Case) -> int:
    """How many steps a case is away from nn.GRU in bfloat16 at what people run and at the coarse
    sizes, or in another variant or dtype at the coarsest of them."""
    other = (case.variant != "torch") + (case.dtype != "bf16")
    if joined_by_peers(case) or asks_cudnn(case):
        return 0
    if case in set(workloads(case.variant, case.dtype)):
        return other
    coarse_H = case.H in HIDDEN
    if other == 1 and case.dtype != "fp16" and coarse_H and is_plain(case) and case.B in (1, 64):
        return 0
    return other + (case.B not in COARSE) + (not coarse_H)


def odds(case: Case) -> int:
    """What speaks for a loss. Very many rows or few steps: cuDNN's products are large then, or the
    launches weigh most. H ≤ 128: cuDNN has kernels that are persistent themselves. An H between
    whole tiles: TriGRU's programs compute padding."""
    return (case.B >= 1024) + (case.T <= 32) + (case.H <= 128) + (case.H in HIDDEN_BETWEEN)


def is_plain(case: Case) -> bool:
    """One layer in one direction at the grid's length."""
    return (case.T, case.layers, case.directions, case.packed) == (512, 1, 1, False)


def joined_by_peers(case: Case) -> bool:
    """Whether the providers join that take long to build or to run. A loop has few steps here, so
    that its graph stays small."""
    shape = (case.dtype, case.T, case.B, case.H, case.layers, case.directions, case.packed)
    return shape == ("bf16", 64, 64, 256, 1, 1, False)


def asks_cudnn(case: Case) -> bool:
    """Where cuDNN is asked for the persistent kernel that nn.GRU does not ask for: in float16, for
    which PyTorch asks for it elsewhere."""
    return is_plain(case) and (*case[:2], case.B, case.H) in (
        ("torch", "fp16", 16, 512), ("torch", "fp16", 64, 1024),
    )  # fmt: skip


def long_and_short(on_cuda: bool) -> Iterator[Case]:
    """Where the error of each result is listed: it could grow with the number of steps."""
    dtypes = ("bf16", "fp16", "fp32") if on_cuda else ("fp32",)
    hidden, lengths = ((256, 1024), (64, 512, 2048)) if on_cuda else ((64,), (8, 64, 512))
    for variant, dtype, H, T in product(VARIANTS, dtypes, hidden, lengths):
        yield Case(variant, dtype, T, 16, I=H, H=H)


def profiled() -> Iterator[Case]:
    """Where the kernels of each provider are listed: about where cuDNN changes its algorithm."""
    for H, dtype in product((64, 128, 256, 1024), ("bf16", "fp32")):
        yield Case("torch", dtype, 512, 64, I=H, H=H)


SETS = {"smoke": smoke, "default": default, "core": core}
