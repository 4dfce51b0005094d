"""The named sets of shapes that `python -m perf sweep` measures."""

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


def smoke() -> Iterator[Case]:
    """Small shapes that a CPU gets through within a minute."""
    for variant, T, H, B in product(VARIANTS, (16, 64), (32, 64, 128), (1, 16)):
        yield Case(variant, "fp32", T, B, I=H, H=H)


COARSE = (1, 16, 64, 256)  # of the batch sizes below


def core() -> list[Case]:
    """The shapes for a GPU: one layer of every size, other lengths, layers and directions.

    Those that say most come first, so that a sweep that is cut off has a coarse picture of all:
    each step away from nn.GRU in bfloat16 at the coarse batch sizes comes one round later."""
    hidden, batch = (64, 128, 256, 512, 768, 1024, 1536, 2048), (1, 8, 16, 32, 64, 128, 256)
    shapes = [(512, B, H, 1, 1) for H, B in product(hidden, batch)]
    shapes += [(T, B, 512, 1, 1) for T, B in product((16, 64, 2048), batch)]
    for layers, directions in ((2, 1), (4, 1), (1, 2)):
        shapes += [(512, B, H, layers, directions) for H, B in product((256, 512, 1024), (16, 64))]
    cases = [
        Case(variant, dtype, T, B, H, H, layers, directions)
        for variant, dtype, (T, B, H, layers, directions) in product(
            VARIANTS, ("bf16", "fp32", "fp16"), shapes
        )
    ]

    def rounds(case: Case) -> int:
        return (case.variant != "torch") + (case.dtype != "bf16") + (case.B not in COARSE)

    return sorted(cases, key=rounds)


def measured_by_all(case: Case) -> bool:
    """Whether the providers join that take long to build or to run."""
    plain = (case.dtype, case.T, case.layers, case.directions) == ("bf16", 512, 1, 1)
    return plain and (case.B, case.H) in ((1, 256), (64, 1024))


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


SETS = {"smoke": smoke, "core": core}
