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


def core() -> Iterator[Case]:
    """The shapes of one layer on a GPU, 512 steps long."""
    hidden = (64, 128, 256, 512, 768, 1024, 1536, 2048)
    batch = (1, 8, 16, 32, 64, 128, 256)
    for variant, dtype, H, B in product(VARIANTS, ("bf16", "fp16", "fp32"), hidden, batch):
        yield Case(variant, dtype, 512, B, I=H, H=H)


SETS = {"smoke": smoke, "core": core}
