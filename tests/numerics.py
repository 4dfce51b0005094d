"""The tolerance rule as an assertion."""

from trigru.accuracy import violations


def assert_within_rule(actual: dict, exact: dict, yardstick: dict) -> None:
    """Every result of `actual` obeys the tolerance rule; the message lists all that do not."""
    assert actual.keys() == exact.keys() == yardstick.keys()
    for name in actual:
        assert actual[name].dtype == yardstick[name].dtype, name
    broken = violations(actual, exact, yardstick)
    assert not broken, "; ".join(broken)
