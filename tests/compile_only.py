"""A session of pytest that is there for the kernels that the GPU tests launch, and compiles them
instead: see perf.ahead.compile_tests. Several such processes share the tests of a session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf.ahead import COMPILE_ONLY


def folder() -> Path | None:
    """In which the processes agree on who runs which test; None where tests are real ones."""
    return Path(os.environ[COMPILE_ONLY]) if COMPILE_ONLY in os.environ else None


def wanted(item: pytest.Item) -> bool:
    """Whether to compile ahead what a test launches: not where its mark says
    `gpu(compiled_ahead=False)`, as of tests that launch nothing or time whole programs."""
    mark = item.get_closest_marker("gpu")
    return mark is not None and mark.kwargs.get("compiled_ahead", True)


def run_shared(session: pytest.Session, folder: Path) -> None:
    """Run the tests that no other process has begun. The next one is taken before this one runs,
    since pytest tears down in between what that one does not need."""
    mine = taken(session.items, folder)
    item = next(mine, None)
    while item is not None:
        following = next(mine, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following


def taken(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    for number, item in enumerate(items):
        try:
            (folder / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield item
