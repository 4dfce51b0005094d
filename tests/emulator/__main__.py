"""Run the library's kernels in the emulator, more of them than the tests do:

    python -m tests.emulator check [WORD …]     a wide matrix of cases; those whose lines have WORD
    python -m tests.emulator fuzz FIRST COUNT   random cases, by number
    python -m tests.emulator mutants [WORD …]   planted faults, each to be found by the right check
    python -m tests.emulator barriers           which barriers nothing is found to need

A line for each that fails, or with -v for each; a summary; exit status 1 if any failed."""

import argparse
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where tests find each other

import torch

from trigru import launch
from trigru.plan import NoPlan

from . import mutants
from .cases import Case, what_is_wrong
from .matrix import matrix, random_case


def run_cases(cases: Iterable[Case], verbose: bool) -> bool:
    """Whether none failed."""
    start, count, failed, instructions = time.monotonic(), 0, 0, 0
    for case in cases:
        before = time.monotonic()
        try:
            wrong, emulators = what_is_wrong(case)
        except NoPlan as error:
            print(f"no plan: {case}: {error}")
            continue
        except Exception:  # a line like any other: those after it have their say
            wrong, emulators = [traceback.format_exc(limit=-3)], []
        launch.error_flag(torch.device("cpu")).zero_()
        count += 1
        failed += bool(wrong)
        instructions += sum(r.instructions for e in emulators for r in e.results)
        took = time.monotonic() - before
        if wrong or verbose:
            shown = "".join(f"\n    {line[:900]}" for line in wrong[:12])
            print(f"{'FAILED' if wrong else 'ok'} {took:.2f} s {case}{shown}", flush=True)
    print(
        f"{count} cases, {failed} failed; {instructions / 1e6:.0f} M warp instructions, "
        f"{time.monotonic() - start:.0f} s"
    )
    return not failed


def main() -> bool:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["check", "fuzz", "mutants", "barriers"])
    parser.add_argument("rest", nargs="*", metavar="WORD | FIRST COUNT")
    parser.add_argument("-v", action="store_true", help="a line for each case")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.command == "mutants":
        return mutants.run(given.rest)
    if given.command == "barriers":
        return mutants.barriers()
    if given.command == "fuzz":
        if len(given.rest) != 2 or not all(number.isdigit() for number in given.rest):
            parser.error(f"fuzz takes two numbers, FIRST and COUNT, not {given.rest}")
        first, count = map(int, given.rest)
        return run_cases(map(random_case, range(first, first + count)), given.v)
    cases = (case for case in matrix() if all(word in str(case) for word in given.rest))
    return run_cases(cases, given.v)


if __name__ == "__main__":
    raise SystemExit(not main())
