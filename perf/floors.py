"""What a call must take at least on a device, from what was measured on it.

A floor is what a call must take at least: the most of the time to move its bytes, to do its FLOPs,
to launch anything at all, and to walk the chain of its steps one after another. The rates behind it
are measured, not taken from a data sheet; so is what a step costs when nothing is left of it but to
hand over the state between the programs of a group.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from trigru.plan import DeviceLimits, LaunchPlan, NoPlan, plan_launch

from .measure import FACTS, dtype_name
from .providers import DTYPES
from .shapes import Case


class Exchange(NamedTuple):
    """What the cost of handing over the state in one step depends on."""

    dtype: str  # of its width: "bf16" or "fp32"
    programs: int  # of a group
    groups: int  # that run at once, those of a second direction included
    rows: int  # of a group's tile that are not padding
    regime: str
    wgmma: bool  # which decides what a thread stores
    BLOCK_H: int
    BLOCK_B: int
    warps: int
    H_pad: int
    chunks: int
    slices: int  # tiles that are published and awaited together
    turns: int  # exchanges one after another


COLUMNS = (*FACTS, "name", *Exchange._fields, "p20", "p50", "p80", "unit")

PRODUCTS = DTYPES | {"tf32": torch.float32}  # how products are computed, as the sweep names it
EXCHANGED = {2: "bf16", 4: "fp32"}  # what is exchanged, by the bytes of an element
SHARED_BYTES_PER_CLOCK = 128  # out of an SM's shared memory


@dataclass(frozen=True)
class Floors:
    """What was measured on a device, and what follows for a case."""

    measured: dict[tuple[str, ...], float]  # at its fastest, by the columns "name" to "turns"

    @staticmethod
    def read(path: Path, device: str) -> "Floors | None":
        """The measurements of the device of this name, of equal ones the last; None if there are
        none."""
        if not path.exists():
            return None
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["device"] == device]
        names = ("name", *Exchange._fields)
        # A floor is a bound: the short times count, and the high rates.
        measured = {
            tuple(row[name] for name in names): float(row["p20" if row["unit"] == "us" else "p80"])
            for row in rows
        }
        return Floors(measured) if measured else None

    def of(self, case: Case, mode: str, limits: DeviceLimits) -> float | None:
        """The microseconds that a call in this mode must take; None if a measurement is missing, or
        packed, where fewer and fewer rows hand over less than what was measured."""
        if case.packed:
            return None
        try:
            return max(
                self._constant("graph"),
                bytes_moved(case, mode) / (1e3 * self._constant("bandwidth")),
                flops(case, mode) / (1e6 * self._rate(case)),
                self._chain(case, mode, limits),
            )
        except KeyError:
            return None

    def _chain(self, case: Case, mode: str, limits: DeviceLimits) -> float:
        """The steps that must follow each other. Layers could overlap as a wavefront, so each adds
        one step; batch tiles and directions could all overlap, so they add none."""
        steps = case.T + case.layers - 1
        total = 0.0
        for backward in passes(mode):
            try:
                plan = plan_of(case, backward, limits)
            except NoPlan:
                return 0.0
            # In every step an SM multiplies its share of U by its rows of the state, and reads from
            # its shared memory what of U lies there.
            u, u_shared = 3 * plan.BLOCK_H * plan.H_pad, plan.u_shared / plan.chunks
            rate = self._rate(case) / limits.sm_count
            step = max(
                2 * u * plan.rows / (1e6 * rate),
                u * u_shared * itemsize(case) / (SHARED_BYTES_PER_CLOCK * self._constant("clock")),
            )
            if not plan.solo:
                key = ("exchange", *map(str, exchange_of(plan, case, backward)))
                step = max(step, self.measured[key])
            total += steps * step
        return total

    def _rate(self, case: Case) -> float:
        """Of products. The kernels' float32 ones are three of TF32: what is faster counts."""
        product = dtype_name(case.dtype, torch.device("cuda"))
        rate = self._constant("matmul", product)
        return max(rate, self._constant("matmul", "tf32") / 3) if product == "fp32" else rate

    def _constant(self, name: str, dtype: str = "") -> float:
        return self.measured[(name, dtype, *[""] * (len(Exchange._fields) - 1))]


def passes(mode: str) -> tuple[bool, ...]:
    """Whether each persistent kernel that a call in this mode runs is the backward one."""
    return (False,) if mode == "forward" else (False, True)


def bytes_moved(case: Case, mode: str) -> int:
    """Every input of a call read once and every output written once: x, h0, weights, y and h_n. In
    training as much again: the gradient of each."""
    T, B, H, D = case.T, case.B, case.H, case.directions
    biases = 2 if case.variant == "torch" else 1
    weights = D * sum(3 * H * (size + H + biases) for size in input_sizes(case))
    states = 2 * case.layers * D * B * H  # h0 and h_n
    elements = T * B * (case.I + D * H) + states + weights
    return elements * itemsize(case) * len(passes(mode))


def flops(case: Case, mode: str) -> int:
    """Of the input projections and the recurrent products. Each has two more like it in training,
    for the gradients of both its factors."""
    macs = 3 * case.H * case.T * case.B * sum(size + case.H for size in input_sizes(case))
    return 2 * macs * case.directions * (1 if mode == "forward" else 3)


def itemsize(case: Case) -> int:
    return PRODUCTS[case.dtype].itemsize


def input_sizes(case: Case) -> list[int]:
    """Of each layer."""
    return [case.I] + [case.directions * case.H] * (case.layers - 1)


def plan_of(case: Case, backward: bool, limits: DeviceLimits) -> LaunchPlan:
    """How the library would run one layer of the case. Raises NoPlan if it would not."""
    return plan_launch(
        limits, B=case.B, H=case.H, D=case.directions, itemsize=itemsize(case),
        backward=backward, textbook=case.variant == "textbook",
        exact=dtype_name(case.dtype, torch.device("cuda")) == "fp32",
    )  # fmt: skip


def exchange_of(plan: LaunchPlan, case: Case, backward: bool) -> Exchange:
    """What the programs of a group plan hand over in a step.

    The textbook form's backward pass has four tiles to hand over in its two turns. Here it is one
    in each, so that the floor stays a lower bound."""
    programs, tiles, directions = plan.grid(case.B)
    textbook = case.variant == "textbook"
    return Exchange(
        dtype=EXCHANGED[itemsize(case)], programs=programs, groups=tiles * directions,
        rows=plan.rows, regime=plan.regime, wgmma=plan.wgmma, BLOCK_H=plan.BLOCK_H,
        BLOCK_B=plan.BLOCK_B, warps=plan.num_warps, H_pad=plan.H_pad, chunks=plan.chunks,
        slices=3 if backward and not textbook else 1, turns=2 if textbook else 1,
    )  # fmt: skip


def exchanges(cases: Sequence[Case], limits: DeviceLimits) -> dict[Exchange, LaunchPlan]:
    """The distinct exchanges of both passes of these cases, each with a plan that has it."""
    found = {}
    for case in (case for case in cases if not case.packed):
        for backward in passes("training"):
            try:
                plan = plan_of(case, backward, limits)
            except NoPlan:
                continue
            if not plan.solo:
                found[exchange_of(plan, case, backward)] = plan
    return found
