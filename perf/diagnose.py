"""Which kernels are wrong, and for which shapes: each pass alone, over small problems.

The forward kernel is judged by itself, the backward kernel from the reference's y and gates. What
the rule calls PyTorch's own is the reference here. A kernel that raises, hangs or takes the process
down is left alone from there on: the file of rows tells the process that goes on."""

import csv
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trigru import accuracy, backward, forward, reference
from trigru.launch import is_exact, raise_if_failed
from trigru.plan import LaunchPlan, candidates, clocks, device_limits

from .measure import FACTS, append_row, facts, is_lost, kernel_hash, now
from .progress import tqdm
from .providers import DTYPES
from .shapes import VARIANTS
from .sweep import DeviceLost

LENGTHS, BATCHES, DIRECTIONS = (1, 2, 7), (1, 3, 17), (1, 2)
# Hidden sizes by regime and the bytes of an element: without and with padding, or with it alone.
HIDDEN: dict[str, dict[int, tuple[int, ...]]] = {
    "solo": {2: (64, 56), 4: (64, 56)},
    "latency": {2: (256, 144), 4: (128, 80)},
    "throughput": {2: (144,), 4: (80,)},
}
RESULTS = {"forward": ("y", "h_n", "gates"), "backward": ("dgx", "dgh", "dh0")}
BEGAN, OK, WRONG = "began", "ok", "wrong"  # of a status, which else is what was raised


class Trial(NamedTuple):
    """One launch of one kernel. All but T and B are compiled in, and what a tile has room for."""

    variant: str
    dtype: str
    walk: str  # a key of RESULTS
    regime: str  # a key of HIDDEN
    H: int
    directions: int
    T: int
    B: int

    @property
    def kernel(self) -> tuple:
        return self[: self._fields.index("T")]


class Problem(NamedTuple):
    """What a trial computes from, and how."""

    given: dict[str, Any]  # tensors, or None
    switches: dict[str, Any]
    plan: LaunchPlan


COLUMNS = (*FACTS, *Trial._fields, "status", "result", "rel_err", "allowed")


def trials() -> list[Trial]:
    """All of them, the smallest first."""
    found = [
        Trial(variant, dtype, walk, regime, H, D, T, B)
        for variant, dtype, walk, regime in product(VARIANTS, DTYPES, RESULTS, HIDDEN)
        for H in HIDDEN[regime][DTYPES[dtype].itemsize]
        for D, T, B in product(DIRECTIONS, LENGTHS, BATCHES)
    ]
    return sorted(found, key=lambda t: t.T * t.B * t.directions * t.H)


def run_diagnosis(wanted: Sequence[Trial], device: torch.device, path: Path, dump: Path) -> bool:
    """Run the trials that the CSV file at `path` does not know yet, append theirs, keep the first
    one that fails in `dump`, and print what all of them come to. Whether none failed.

    Raises DeviceLost where a kernel has left the device in a bad state."""
    here, known = facts(device), statuses(path)
    for trial in [trial for trial, status in known.items() if status != OK][:1]:
        keep(dump, trial, make_problem(trial, device), None)  # if its own process could not
    for trial in tqdm(wanted, desc="diagnose"):
        if trial in known or trial.kernel in {t.kernel for t in known if broke(known[t])}:
            continue
        problem = make_problem(trial, device)
        exact, yardstick = references(trial, problem)
        row = here | trial._asdict() | dict.fromkeys(("result", "rel_err", "allowed"))
        row |= {"status": BEGAN, "date": now()}
        append_row(path, COLUMNS, row)
        got: dict[str, Tensor] = {}
        try:
            got = launched(trial, problem)
        except Exception as error:
            row["status"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        else:
            row |= judged(got, exact, yardstick)
        append_row(path, COLUMNS, row)
        known[trial] = row["status"]
        if is_lost(device):
            raise DeviceLost(f"the device failed in {trial}")
        if row["status"] != OK:
            keep(dump, trial, problem, got)
    print(account(path), flush=True)
    return all(status == OK for status in known.values())


def make_problem(trial: Trial, device: torch.device) -> Problem:
    """The same numbers for the same trial."""
    torch.manual_seed(0)
    textbook, D, dtype = trial.variant == "textbook", trial.directions, DTYPES[trial.dtype]
    inputs, cotangents = accuracy.problem(
        trial.T, trial.B, D, trial.H, textbook=textbook, dtype=dtype, device=device
    )
    switches: dict[str, Any] = {
        "offsets": None, "textbook": textbook, "reverse": False, "bidirectional": D == 2,
    }  # fmt: skip
    plan = plan_of(trial, device)
    if trial.walk == "forward":
        return Problem(inputs, switches | {"save": True}, plan)
    y, _, gates = reference.gru_forward(**inputs, **switches)
    saved = {"h0": inputs["h0"], "w_hh": inputs["w_hh"], "y": y, "gates": gates}
    return Problem(cotangents | saved, switches, plan)


def plan_of(trial: Trial, device: torch.device) -> LaunchPlan:
    """The best one of the trial's regime, which need not be the best of all."""
    which = {"backward": trial.walk == "backward", "textbook": trial.variant == "textbook"}
    dtype = DTYPES[trial.dtype]
    plans = candidates(
        device_limits(device), B=trial.B, H=trial.H, D=trial.directions, itemsize=dtype.itemsize,
        exact=is_exact(dtype, device), **which,
    )  # fmt: skip
    of_regime = [plan for plan in plans if plan.regime == trial.regime]
    return min(of_regime, key=lambda plan: clocks(plan, trial.B, **which))


def launched(trial: Trial, problem: Problem) -> dict[str, Tensor]:
    """What the kernel computes."""
    launcher: Callable = forward.gru_forward if trial.walk == "forward" else backward.gru_backward
    results = launcher(**problem.given, **problem.switches, plan=problem.plan)
    device = results[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    raise_if_failed(device)
    return named(trial, results)


def named(trial: Trial, results: tuple) -> dict[str, Tensor]:
    """By name; the walk back's gradients of what trials do not have come last, and are empty."""
    names = RESULTS[trial.walk]
    return dict(zip(names, results[: len(names)], strict=True))


def references(trial: Trial, problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the reference computes in float64, and in the trial's dtype."""
    function: Callable = (
        reference.gru_forward if trial.walk == "forward" else reference.gru_backward
    )
    doubles = {name: None if t is None else t.double() for name, t in problem.given.items()}
    exact = named(trial, function(**doubles, **problem.switches))
    with accuracy.products_as_in_rnns():
        own = named(trial, function(**problem.given, **problem.switches))
    return exact, own


def judged(got: Mapping, exact: Mapping, yardstick: Mapping) -> dict[str, Any]:
    """The columns of the result that is furthest off, by what the rule allows it."""
    errors = {name: accuracy.relative_error(got[name], exact[name]) for name in exact}
    allowed = {name: accuracy.allowed_error(yardstick[name], exact[name]) for name in exact}
    worst = max(exact, key=lambda name: errors[name] / allowed[name])
    return {
        "status": WRONG if accuracy.violations(got, exact, yardstick) else OK,
        "result": worst, "rel_err": errors[worst], "allowed": allowed[worst],
    }  # fmt: skip


def keep(dump: Path, trial: Trial, problem: Problem, got: Mapping[str, Tensor] | None) -> None:
    """What a trial computed from, what it should have and what it has: one file, of the first that
    fails alone."""
    if dump.exists():
        return
    exact, _ = references(trial, problem)
    parts: dict[str, Mapping] = {"inputs": problem.given, "expected": exact, "got": got or {}}
    on_cpu: dict[str, Any] = {
        part: {name: None if t is None else t.cpu() for name, t in tensors.items()}
        for part, tensors in parts.items()
    }
    torch.save(on_cpu | {"trial": trial._asdict(), "plan": str(problem.plan)}, dump)


def broke(status: str) -> bool:
    """Whether the kernel did not even end as it should."""
    return status not in (OK, WRONG)


def statuses(path: Path) -> dict[Trial, str]:
    """The last word on each trial of these kernels that was begun, in order."""
    return {trial: row["status"] for trial, row in _last_rows(path).items()}


def account(path: Path) -> str:
    """A table of the kernels that fail, and in which of their trials."""
    rows = _last_rows(path)
    if not rows:
        return "no kernel has been tried alone"
    lines = []
    for regime, walk, variant, dtype in product(HIDDEN, RESULTS, VARIANTS, DTYPES):
        of = {
            trial: row for trial, row in rows.items() if trial[:4] == (variant, dtype, walk, regime)
        }
        failed = [trial for trial, row in of.items() if row["status"] != OK]
        if not failed:
            continue
        where = ", ".join(
            f"{name} = {'|'.join(map(str, sorted({getattr(t, name) for t in failed})))}"
            for name in ("H", "directions", "T", "B")
        )
        first = of[failed[0]]
        what = first["status"]
        if what == WRONG:
            error, allowed = float(first["rel_err"]), float(first["allowed"])
            what = f"{first['result']}: relative error {error:.2e}, allowed {allowed:.2e}"
        lines.append(f"  {variant:8} {dtype} {walk:8} {regime:10}: {len(failed)} of {len(of)} fail")
        lines.append(f"    where {where}; the first: {what}")
    if not lines:
        return f"no kernel alone fails, in {len(rows)} launches"
    return "\n".join(["kernels that fail:", *lines])


def _last_rows(path: Path) -> dict[Trial, dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel_hash"] == kernel_hash()]
    types = Trial.__annotations__
    return {Trial(**{name: types[name](row[name]) for name in Trial._fields}): row for row in rows}
