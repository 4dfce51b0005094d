"""`python -m perf sweep`: is every provider right, how fast is it, what memory does it take?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from trigru.accuracy import products_as_in_rnns, relative_error, violations
from trigru.launch import raise_if_failed

from .measure import (
    Call,
    Clock,
    append_row,
    clock_for,
    facts,
    interleave,
    now,
    peak_bytes,
    percentiles,
    uses_tf32,
)
from .providers import DTYPES, Build, Provider, Weights, build_eager, build_torch, builders
from .shapes import MODES, Case

COLUMNS = (
    "device", "sm", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash", "date",
    "provider", "variant", "mode", "dtype", "T", "B", "I", "H", "layers", "directions",
    "p20_us", "p50_us", "p80_us", "us_per_step", "floor_us", "peak_bytes", "max_rel_err", "status",
)  # fmt: skip

Row = dict[str, Any]  # a CSV row by column
Results = dict[str, Tensor]  # y, h_n, dx, dh0 and the gradients of the weights, by name

# A yardstick further off than this part of the largest exact value measures nothing.
USELESS_YARDSTICK = 0.5


class Problem(NamedTuple):
    """What a case computes from, all in one dtype, and the gradients that arrive at its results."""

    weights: Weights
    x: Tensor  # (T, B, I)
    h0: Tensor  # (layers · directions, B, H)
    dy: Tensor  # (T, B, directions · H)
    dh_n: Tensor  # as h0


def run_sweep(
    cases: Sequence[Case],
    device: torch.device,
    path: Path,
    *,
    seconds: float,
    clock: Clock | None = None,
    builders_of: Callable[[str, torch.device], Mapping[str, Build]] = builders,
) -> bool:
    """Measure the cases, both modes of each, and append a row for each provider to the CSV file at
    `path`. Each mode of a case is timed for about `seconds`. True if every row of TriGRU is ok."""
    here, clock = facts(device), clock or clock_for(device)
    good = True
    # In float32 the eager loop and the input projections compute as nn.GRU does: TF32 by default.
    with products_as_in_rnns(), tqdm(total=len(cases) * len(MODES), desc="sweep") as bar:
        for case in cases:
            build = builders_of(case.variant, device)
            for rows in measure_case(case, device, build, clock, seconds):
                for row in rows:
                    append_row(path, COLUMNS, here | {"date": now()} | row)
                    if row["status"] != "ok":
                        said = ("provider", "variant", "mode", "dtype", "T", "B", "H", "status")
                        bar.write("not timed: " + " ".join(str(row[column]) for column in said))
                        good = good and row["provider"] != "trigru"
                bar.update()
    return good


def measure_case(
    case: Case, device: torch.device, build: Mapping[str, Build], clock: Clock, seconds: float
) -> Iterator[list[Row]]:
    """For each mode one row for each provider, with the columns from `provider` on. Each mode is
    timed for about `seconds`."""
    try:
        problem = make_problem(case, device)
        exact = exact_results(case, problem)
    except Exception as error:
        for mode in MODES:
            status = f"no reference: {_text(error)}"
            yield [_row(case, device, mode, name, status) for name in build]
        return
    for mode in MODES:
        yield measure_mode(case, device, problem, exact, mode, build, clock, seconds)


def measure_mode(
    case: Case,
    device: torch.device,
    problem: Problem,
    exact: Results,
    mode: str,
    build: Mapping[str, Build],
    clock: Clock,
    seconds: float,
) -> list[Row]:
    """One row for each provider. Those whose results are right are timed in turn; the first one is
    the yardstick of what is right."""
    rows = {name: _row(case, device, mode, name, "ok") for name in build}
    wanted = exact if mode == "training" else {name: exact[name] for name in ("y", "h_n")}
    calls: dict[str, Call] = {}
    yardstick: Results | None = None
    results: Results = {}
    for i, (name, row) in enumerate(rows.items()):
        try:
            provider = build[name](case, problem.weights, mode == "training")
            call = make_call(provider, problem, mode)
            results = dict(zip(wanted, call(), strict=True))
            row["max_rel_err"], status = judge(results, wanted, yardstick)
            if i > 0 and yardstick is None:
                status = "unchecked: the yardstick has no result"
            row["status"] = status
            if status == "ok":
                yardstick = yardstick or results
                row["peak_bytes"] = peak_bytes(call, device)
                calls[name] = call
        except Exception as error:
            row["status"] = f"error: {_text(error)}"
    del yardstick, results
    try:
        times = interleave(calls, clock, seconds) if calls else {}
        if device.type == "cuda":
            raise_if_failed(problem.x.device)
    except Exception as error:
        for name in calls:
            rows[name]["status"] = f"error while timed: {_text(error)}"
        return list(rows.values())
    for name in times:
        p20, p50, p80 = (round(p, 3) for p in percentiles(times[name]))
        rows[name] |= {"p20_us": p20, "p50_us": p50, "p80_us": p80, "us_per_step": p50 / case.T}
    return list(rows.values())


def judge(results: Results, exact: Results, yardstick: Results | None) -> tuple[float, str]:
    """The largest relative error of the results, and "ok" or what is wrong with them.

    trigru.accuracy's rule, or without a yardstick, as for the yardstick itself, that they are of
    any use as one."""
    worst = max(relative_error(results[name], exact[name]) for name in exact)
    if yardstick is None:
        useful = worst <= USELESS_YARDSTICK
        return worst, "ok" if useful else f"wrong: relative error {worst:.2e}, of no use"
    broken = violations(results, exact, yardstick)
    broken += [
        f"{name} is {results[name].dtype}, not {yardstick[name].dtype}"
        for name in exact
        if results[name].dtype != yardstick[name].dtype
    ]
    return worst, f"wrong: {'; '.join(broken)}" if broken else "ok"


def make_problem(case: Case, device: torch.device) -> Problem:
    """The same random numbers for the same case: nn.GRU's initial weights, inputs and gradients of
    unit variance, a state between -1 and 1."""
    torch.manual_seed(0)
    dtype, D = DTYPES[case.dtype], case.directions
    layer = torch.nn.GRU(
        case.I, case.H, case.layers, bidirectional=D == 2, device=device, dtype=dtype
    )
    bias_hh = () if case.variant == "torch" else ("bias_hh",)
    weights = {k: v.detach() for k, v in layer.named_parameters() if not k.startswith(bias_hh)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return Problem(
        weights,
        x=normal(case.T, case.B, case.I),
        h0=normal(case.layers * D, case.B, case.H).tanh(),
        dy=normal(case.T, case.B, D * case.H),
        dh_n=normal(case.layers * D, case.B, case.H),
    )


def exact_results(case: Case, problem: Problem) -> Results:
    """The results of training in float64, of nn.GRU or the eager loop: y, h_n, dx, dh0 and the
    gradient of each weight, by name and in the order of `make_call`."""
    weights = {name: w.double() for name, w in problem.weights.items()}
    double = Problem(weights, *(t.double() for t in problem[1:]))
    build = build_torch if case.variant == "torch" else build_eager
    names = ("y", "h_n", "dx", "dh0", *(f"d{name}" for name in weights))
    results = make_call(build(case, weights, True), double, "training")()
    return dict(zip(names, results, strict=True))


def make_call(provider: Provider, problem: Problem, mode: str) -> Callable[[], Sequence[Tensor]]:
    """What is timed. In the forward mode the layer without gradients; in training the layer, then
    the gradients of its input, its initial state and all its weights."""
    if mode == "forward":

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return provider.layer(problem.x, problem.h0)

        return forward

    x, h0 = (t.detach().requires_grad_() for t in (problem.x, problem.h0))

    def training() -> Sequence[Tensor]:
        y, h_n = provider.layer(x, h0)
        arriving = (problem.dy, problem.dh_n)
        gradients = torch.autograd.grad((y, h_n), (x, h0, *provider.parameters), arriving)
        return y.detach(), h_n.detach(), *gradients

    return training


def _row(case: Case, device: torch.device, mode: str, name: str, status: str) -> Row:
    """A row's columns from `provider` on, with nothing measured yet."""
    row: Row = dict.fromkeys(COLUMNS[COLUMNS.index("provider") :])
    row |= case._asdict() | {"provider": name, "mode": mode, "status": status}
    if case.dtype == "fp32" and uses_tf32(device):
        row["dtype"] = "tf32"
    return row


def _text(error: Exception) -> str:
    """The type and the first line of what an exception says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
