"""`python -m perf sweep`: is every provider right, how fast is it, what memory does it take?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from trigru.accuracy import allowed_error, relative_error
from trigru.launch import raise_if_failed

from .measure import (
    Call, Clock, append_row, clock_for, facts, interleave, now, peak_bytes, percentiles,
)  # fmt: skip
from .providers import DTYPES, Build, Provider, Weights, build_eager, build_torch, builders
from .shapes import MODES, Case

COLUMNS = (
    "device", "sm", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash", "date",
    "provider", "variant", "mode", "dtype", "T", "B", "I", "H", "layers", "directions",
    "p20_us", "p50_us", "p80_us", "us_per_step", "floor_us", "peak_bytes", "max_rel_err", "status",
)  # fmt: skip

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
    if device.type == "cuda":
        # The recurrent layers' own setting, TF32 by default, for the products of all providers.
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision
    here, clock = facts(device), clock or clock_for(device)
    good = True
    with tqdm(total=len(cases) * len(MODES), unit="case", desc="sweep") as bar:
        for case in cases:
            for mode, rows in measure_case(case, device, builders_of(case.variant, device), clock, seconds):
                for row in rows:
                    append_row(path, COLUMNS, here | {"date": now()} | row)
                    if row["status"] != "ok":
                        shape = f"{row['dtype']} T={case.T} B={case.B} I={case.I} H={case.H}"
                        bar.write(f"{row['provider']} {case.variant} {mode} {shape}: {row['status']}")
                        good = good and row["provider"] != "trigru"
                bar.update()
    return good


def measure_case(
    case: Case, device: torch.device, build: Mapping[str, Build], clock: Clock, seconds: float
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For each mode, its name and one row for each provider, with the columns from `provider` on."""
    try:
        problem = make_problem(case, device)
        exact = exact_results(case, problem)
    except Exception as error:
        for mode in MODES:
            status = f"no reference: {_text(error)}"
            yield mode, [_row(case, device, mode, name, status) for name in build]
        return
    for mode in MODES:
        yield mode, measure_mode(case, device, problem, exact, mode, build, clock, seconds)


def measure_mode(
    case: Case,
    device: torch.device,
    problem: Problem,
    exact: Sequence[Tensor],
    mode: str,
    build: Mapping[str, Build],
    clock: Clock,
    seconds: float,
) -> list[dict[str, Any]]:
    """One row for each provider. Those whose results are right are timed in turn; the first one is
    the yardstick of what is right."""
    rows = {name: _row(case, device, mode, name, "ok") for name in build}
    calls: dict[str, Call] = {}
    yardstick: Sequence[Tensor] | None = None
    for name, row in rows.items():
        try:
            provider = build[name](case, problem.weights, mode == "training")
            call = make_call(provider, problem, mode)
            results = call()
            if not calls and name == next(iter(rows)):
                yardstick = results
            # The forward mode has only the first two results: y and h_n.
            row["max_rel_err"], row["status"] = judge(results, exact[: len(results)], yardstick)
            if yardstick is results and row["status"] != "ok":
                yardstick = None
            del results
            if row["status"] == "ok":
                row["peak_bytes"] = peak_bytes(call, device)
                calls[name] = call
        except Exception as error:
            row["status"] = f"error: {_text(error)}"
    del yardstick
    try:
        times = interleave(calls, clock, seconds) if calls else {}
        if device.type == "cuda":
            raise_if_failed(device)
    except Exception as error:
        for name in calls:
            rows[name]["status"] = f"error while timed: {_text(error)}"
        return list(rows.values())
    for name in times:
        p20, p50, p80 = (round(p, 3) for p in percentiles(times[name]))
        rows[name] |= {"p20_us": p20, "p50_us": p50, "p80_us": p80, "us_per_step": p50 / case.T}
    return list(rows.values())


def judge(
    results: Sequence[Tensor], exact: Sequence[Tensor], yardstick: Sequence[Tensor] | None
) -> tuple[float, str]:
    """The largest relative error of the results, and "ok" or what is wrong with them.

    trigru.accuracy's rule for each result apart. The yardstick itself need only be usable."""
    errors = [relative_error(a, e) for a, e in zip(results, exact, strict=True)]
    worst = max(errors)
    if yardstick is None:
        return worst, "unchecked: the yardstick has no result"
    if results is yardstick:
        return worst, "ok" if worst <= USELESS_YARDSTICK else f"wrong: off by {worst:.1e}"
    for i, (a, e, y) in enumerate(zip(results, exact, yardstick, strict=True)):
        if a.dtype != y.dtype:
            return worst, f"wrong: result {i} is {a.dtype}, not {y.dtype}"
        if not errors[i] <= (allowed := allowed_error(y, e)):
            return worst, f"wrong: result {i} is off by {errors[i]:.1e}, allowed {allowed:.1e}"
    return worst, "ok"


def make_problem(case: Case, device: torch.device) -> Problem:
    """The same random numbers for the same case: nn.GRU's initial weights, inputs and gradients of
    unit variance, a state between -1 and 1."""
    torch.manual_seed(0)
    dtype, D = DTYPES[case.dtype], case.directions
    layer = torch.nn.GRU(case.I, case.H, case.layers, bidirectional=D == 2, device=device, dtype=dtype)
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


def exact_results(case: Case, problem: Problem) -> Sequence[Tensor]:
    """The results of training in float64, of nn.GRU or the eager loop: y, h_n, dx, dh0 and the
    gradient of each weight. The results of the forward mode are the first two."""
    weights = {name: w.double() for name, w in problem.weights.items()}
    double = Problem(weights, *(t.double() for t in problem[1:]))
    build = build_torch if case.variant == "torch" else build_eager
    return make_call(build(case, weights, True), double, "training")()


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


def _row(case: Case, device: torch.device, mode: str, name: str, status: str) -> dict[str, Any]:
    """A row's columns from `provider` on, with nothing measured yet."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS[COLUMNS.index("provider") :])
    row |= case._asdict() | {"provider": name, "mode": mode, "status": status}
    if case.dtype == "fp32" and device.type == "cuda":
        tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
        row["dtype"] = "tf32" if tf32 else "fp32"
    return row


def _text(error: Exception) -> str:
    """The type and the first line of what an exception says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
