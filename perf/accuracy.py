"""`python -m perf accuracy`: the error of every result, TriGRU's and PyTorch's, against float64."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from trigru.accuracy import allowed_error, products_as_in_rnns, relative_error
from trigru.launch import raise_if_failed

from .measure import FACTS, append_row, dtype_name, facts, now, reason
from .problem import Results, exact_results, first_call, make_problem
from .progress import tqdm
from .providers import Build, builders
from .shapes import Case

COLUMNS = (
    *FACTS, "provider", "variant", "dtype", "T", "B", "I", "H", "result", "rel_err", "allowed",
    "status",
)  # fmt: skip


def run_accuracy(
    cases: Sequence[Case],
    device: torch.device,
    path: Path,
    builders_of: Callable[[Case, torch.device], Mapping[str, Build]] = builders,
) -> bool:
    """Train one step of each case with TriGRU and the yardstick, and append a row for each of
    their results to the CSV file at `path`: its relative error, and what the rule allows. True if
    all of TriGRU's errors are allowed."""
    here, good = facts(device), True
    with products_as_in_rnns():
        for case in tqdm(cases, desc="accuracy"):
            shape = case._asdict() | {"dtype": dtype_name(case.dtype, device)}
            try:
                for provider, result, error, allowed, status in errors(case, device, builders_of):
                    row = here | shape | {"date": now(), "provider": provider, "result": result}
                    row |= {"rel_err": error, "allowed": allowed, "status": status}
                    append_row(path, COLUMNS, {column: row[column] for column in COLUMNS})
                    good = good and (provider != "trigru" or error <= allowed < math.inf)
            except Exception as failure:
                tqdm.write(f"{case}: {reason(failure)}")
                good = False
    return good


def errors(
    case: Case, device: torch.device, builders_of: Callable[..., Mapping[str, Build]]
) -> Iterator[tuple[str, str, float, float, str]]:
    """(provider, result, its relative error, what is allowed, "ok" with a remark) of the yardstick
    and of TriGRU."""
    problem = make_problem(case, device)
    exact = exact_results(case, problem)
    yardstick: Results | None = None
    for name, build in list(builders_of(case, device).items())[:2]:
        _, tensors, remark = first_call(build(case, problem.weights, True), problem, "training")
        results = dict(zip(exact, tensors, strict=True))
        if device.type == "cuda":
            raise_if_failed(problem.x.device)
        yardstick = yardstick or results
        for result, value in exact.items():
            allowed = allowed_error(yardstick[result], value)
            error = relative_error(results[result], value)
            yield name, result, error, allowed, f"ok: {remark}" if remark else "ok"
