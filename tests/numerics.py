"""The tolerance rule as an assertion, and where the rows of packed sequences lie."""

import torch

from trigru.accuracy import violations


def assert_within_rule(actual: dict, exact: dict, yardstick: dict) -> None:
    """Every result of `actual` obeys the tolerance rule; the message lists all that do not."""
    assert actual.keys() == exact.keys() == yardstick.keys()
    for name in actual:
        assert actual[name].dtype == yardstick[name].dtype, name
    broken = violations(actual, exact, yardstick)
    assert not broken, "; ".join(broken)


def offsets_of(lengths: list[int]) -> torch.Tensor:
    """Where each step's rows begin, for packed sequences of these lengths, the longest first."""
    assert lengths == sorted(lengths, reverse=True)
    running = [sum(n > t for n in lengths) for t in range(lengths[0])]
    return torch.tensor([0, *running]).cumsum(0)
