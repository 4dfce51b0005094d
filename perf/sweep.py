"""`python -m perf sweep`: is every provider right, how fast is it, what memory does it take?"""

import csv
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trigru.accuracy import products_as_in_rnns
from trigru.launch import raise_if_failed
from trigru.plan import device_limits

from .floors import Floors
from .measure import (
    Call,
    Clock,
    alone,
    append_row,
    captured,
    clock_for,
    dtype_name,
    facts,
    garbage_by_hand,
    interleave,
    is_lost,
    now,
    percentiles,
    reason,
)
from .problem import Problem, Results, exact_results, first_call, judge, make_problem
from .progress import tqdm
from .providers import Build, NoKernel, builders
from .shapes import MODES, Case

COLUMNS = (
    "device", "sm", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash", "date",
    "provider", "variant", "mode", "dtype", "T", "B", "I", "H", "layers", "directions", "packed",
    "p20_us", "p50_us", "p80_us", "us_per_step", "host_us", "floor_us", "peak_bytes", "max_rel_err",
    "status",
)  # fmt: skip

Row = dict[str, Any]  # a CSV row by column

NO_CAPTURE = "capture failed"
# Of a call without cuDNN, which launches several kernels for every step.
MOST_STEPS_IN_A_GRAPH = 4096


class Bench(NamedTuple):
    """How to measure."""

    device: torch.device
    seconds: float  # to time each mode of a case, about
    clock: Clock
    capture: Callable[[Call], Call] | None  # a call → the same without Python in it
    builders_of: Callable[[Case, torch.device], Mapping[str, Build]] = builders
    floor: Callable[[Case, str], float | None] = lambda case, mode: None  # in µs


class DeviceLost(RuntimeError):
    """This process cannot go on: a kernel or a capture has left the device in a bad state."""


def make_bench(device: torch.device, seconds: float, floors: Path | None = None) -> Bench:
    """The way to measure on this device, with the floors measured on it, if they are given."""
    on_cuda = device.type == "cuda"
    bench = Bench(device, seconds, clock_for(device), captured if on_cuda else None)
    known = Floors.read(floors, facts(device)["device"]) if on_cuda and floors else None
    if known is None:
        return bench
    limits = device_limits(torch.device("cuda", torch.cuda.current_device()))
    return bench._replace(floor=partial(known.of, limits=limits))


def run_sweep(
    cases: Sequence[Case], path: Path, bench: Bench, until: Callable[[], bool] = lambda: False
) -> bool:
    """Measure the cases, both modes of each, and append a row for each provider to the CSV file at
    `path`, as long as `until()` is false. True if no row of TriGRU is wrong or an error.

    Raises DeviceLost after the case in which that happened."""
    here = facts(bench.device)
    good = True
    # In float32 the eager loop and the input projections compute as nn.GRU does: TF32 by default.
    with (
        products_as_in_rnns(),
        garbage_by_hand(),
        tqdm(total=len(cases) * len(MODES), desc="sweep") as bar,
    ):
        for i, case in enumerate(cases):
            if until():
                bar.write(f"out of time: {len(cases) - i} of {len(cases)} shapes not measured")
                break
            if "persistent" in bench.builders_of(case, bench.device):
                # It calls a library by ctypes. Should that end the process, a new one goes on after
                # this case, which has a row; should it not, another row follows, and counts.
                ended = "error: the process ended here"
                row = _row(case, bench.device, MODES[0], "persistent", ended)
                append_row(path, COLUMNS, here | {"date": now()} | row)
            lost = ""
            for rows in measure_case(case, bench):
                for row in rows:
                    if row["status"].startswith("ok") and NO_CAPTURE in row["status"]:
                        lost = "a capture failed"  # which would disturb those that follow
                    append_row(path, COLUMNS, here | {"date": now()} | row)
                    if not row["status"].startswith("ok"):
                        said = ("provider", "variant", "mode", "dtype", "T", "B", "H", "status")
                        bar.write("not timed: " + " ".join(str(row[column]) for column in said))
                        if row["provider"] == "trigru":
                            good = good and row["status"].startswith("no kernel")
                bar.update()
            gc.collect()
            if is_lost(bench.device):
                lost = "the device failed"
            if lost:
                raise DeviceLost(f"{lost} in {case}")
    return good


def not_measured(cases: Sequence[Case], path: Path, device: torch.device) -> list[Case]:
    """The cases of which the CSV file at `path` has no row of these kernels on this device."""
    if not path.exists():
        return list(cases)
    here, columns = facts(device), (*Case._fields, "device", "kernel_hash")
    with path.open(newline="", encoding="utf-8") as file:
        known = {tuple(row[column] for column in columns) for row in csv.DictReader(file)}

    def key(case: Case) -> tuple[str, ...]:
        row = here | _row(case, device, "", "", "")
        return tuple(str(row[column]) for column in columns)

    return [case for case in cases if key(case) not in known]


def measure_case(case: Case, bench: Bench) -> Iterator[list[Row]]:
    """For each mode one row for each provider, with the columns from `provider` on."""
    build = bench.builders_of(case, bench.device)
    try:
        problem = make_problem(case, bench.device)
        exact = exact_results(case, problem)
    except Exception as error:
        for mode in MODES:
            status = f"no reference: {reason(error)}"
            yield [_row(case, bench.device, mode, name, status) for name in build]
        return
    for mode in MODES:
        rows = measure_mode(case, problem, exact, mode, build, bench)
        floor = bench.floor(case, mode)
        for row in rows:
            if floor is not None and row["provider"] == "trigru":
                row["floor_us"] = round(floor, 3)  # of its own plan
        yield rows


def measure_mode(
    case: Case, problem: Problem, exact: Results, mode: str, build: Mapping[str, Build],
    bench: Bench,
) -> list[Row]:  # fmt: skip
    """One row for each provider. Those whose results are right are timed in turn; the first one is
    the yardstick of what is right."""
    rows = {name: _row(case, bench.device, mode, name, "ok") for name in build}
    wanted = exact if mode == "training" else {name: exact[name] for name in ("y", "h_n")}
    calls: dict[str, Call] = {}
    yardstick: Results | None = None

    def judged(tensors: Sequence[Tensor], name: str) -> tuple[Results, float, str]:
        results = dict(zip(wanted, tensors, strict=True))
        error, status = judge(results, wanted, None if name == next(iter(rows)) else yardstick)
        if bench.device.type == "cuda":
            raise_if_failed(problem.x.device)
        return results, error, status

    for i, (name, row) in enumerate(rows.items()):
        try:
            provider = build[name](case, problem.weights, mode == "training")
            call, tensors, remark = first_call(provider, problem, mode)
            results, row["max_rel_err"], row["status"] = judged(tensors, name)
            del tensors
            if i > 0 and yardstick is None:
                row["status"] = "unchecked: the yardstick has no result"
            if row["status"] == "ok":
                yardstick = yardstick or results
                row["host_us"], row["peak_bytes"] = alone(call, bench.device)
                no_graph = provider.no_graph or why_no_graph(case, remark)
                calls[name], captured_how = without_python(call, no_graph, bench.capture)
                remarks = "; ".join(filter(None, (remark, captured_how)))
                row["status"] = f"ok: {remarks}" if remarks else "ok"
        except NoKernel as why:
            row["status"] = f"no kernel: {why}"
        except Exception as error:
            row["status"] = f"error: {reason(error)}"
    try:
        times = interleave(calls, bench.clock, bench.seconds) if calls else {}
        # What was timed is not what was judged above where it is a graph.
        for name, call in calls.items():
            _, _, status = judged(call(), name)
            if status != "ok":
                rows[name]["status"] = f"{status}, when timed"
                del times[name]
    except Exception as error:
        for name in calls:
            rows[name]["status"] = f"error while timed: {reason(error)}"
        return list(rows.values())
    for name in times:
        p20, p50, p80 = (round(p, 3) for p in percentiles(times[name]))
        rows[name] |= {"p20_us": p20, "p50_us": p50, "p80_us": p80, "us_per_step": p50 / case.T}
    return list(rows.values())


def why_no_graph(case: Case, remark: str) -> str:
    """Why no graph of a call with this remark is captured, if none is."""
    if case.packed:
        return "the lengths are on the host"
    steps = case.T * case.layers * case.directions
    if remark and steps > MOST_STEPS_IN_A_GRAPH:  # without cuDNN
        return f"there are kernels for each of {steps} steps"
    return ""


def without_python(
    call: Call, no_graph: str, capture: Callable[[Call], Call] | None
) -> tuple[Call, str]:
    """What to time for a call, and a remark where it has no graph and Python is timed with it."""
    if capture is None:
        return call, ""
    if no_graph:
        return call, f"no graph: {no_graph}"
    try:
        return capture(call), ""
    except torch.OutOfMemoryError as error:
        return call, f"no graph: {reason(error)}"
    except RuntimeError as error:
        return call, f"{NO_CAPTURE}: {reason(error)}"


def _row(case: Case, device: torch.device, mode: str, name: str, status: str) -> Row:
    """A row's columns from `provider` on, with nothing measured yet."""
    row: Row = dict.fromkeys(COLUMNS[COLUMNS.index("provider") :])
    shape = case._asdict() | {"dtype": dtype_name(case.dtype, device), "packed": int(case.packed)}
    return row | shape | {"provider": name, "mode": mode, "status": status}
