"""`python -m perf accuracy`: the error of every result, TriGRU's and PyTorch's, against float64."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from trigru.accuracy import allowed_error, products_as_in_rnns, relative_error

from .measure import FACTS, append_row, dtype_name, facts, now
from .problem import Results, exact_results, make_call, make_problem
from .providers import Build, builders
from .shapes import Case

COLUMNS = (
    *FACTS, "provider", "variant", "dtype", "T", "B", "I", "H", "result", "rel_err", "allowed",
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
            problem = make_problem(case, device)
            exact = exact_results(case, problem)
            yardstick: Results | None = None
            for name, build in list(builders_of(case, device).items())[:2]:
                call = make_call(build(case, problem.weights, True), problem, "training")
                results = dict(zip(exact, call(), strict=True))
                yardstick = yardstick or results
                shape = case._asdict() | {"dtype": dtype_name(case.dtype, device)}
                known = here | {"date": now(), "provider": name} | shape
                for result, value in exact.items():
                    error = relative_error(results[result], value)
                    allowed = allowed_error(yardstick[result], value)
                    row = known | {"result": result, "rel_err": error, "allowed": allowed}
                    append_row(path, COLUMNS, {column: row[column] for column in COLUMNS})
                    good = good and (name != "trigru" or error <= allowed)
    return good
