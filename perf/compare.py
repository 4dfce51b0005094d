"""`python -m perf compare A.csv B.csv`: what got faster, slower or wrong between two sweeps.

A row is faster or slower only if its interval from p20 to p80 lies apart from that of the other
sweep. The providers other than TriGRU are the control: where they move, the machine did."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from .measure import FACTS, percentiles
from .rows import SHAPE, TEXT, Row, read_csv, timed, unique
from .sweep import COLUMNS

KEY = ("device", "provider", *SHAPE)
GROUP = ("device", "variant", "dtype")
VERSIONS = ("driver", "torch", "triton", "cudnn")
BYTES_BEYOND, ERROR_BEYOND = 1.01, 2.0  # the ratios beyond which a change is told

Line = Sequence[str]  # the cells of a line of a table


class Pair(NamedTuple):
    """The rows of both files that measure the same."""

    a: Row
    b: Row

    @property
    def timed(self) -> bool:
        return timed(self.a) and timed(self.b)

    @property
    def lost(self) -> bool:
        """Whether the time is gone, as that of a wrong result is."""
        return timed(self.a) and not timed(self.b)

    @property
    def speedup(self) -> float:
        return self.a["p50_us"] / self.b["p50_us"]

    @property
    def faster(self) -> bool:
        return self.b["p80_us"] < self.a["p20_us"]

    @property
    def slower(self) -> bool:
        return self.b["p20_us"] > self.a["p80_us"]

    @property
    def moved(self) -> bool:
        return self.faster or self.slower


class Comparison(NamedTuple):
    """Two sweeps, A and B. Of rows that measure the same in one file, the last one counts."""

    paths: tuple[Path, Path]
    rows: tuple[list[Row], list[Row]]
    pairs: list[Pair]
    only: tuple[list[Row], list[Row]]  # rows that the other file lacks

    @property
    def columns(self) -> tuple[str, ...]:
        """What tells rows apart: the device only where there are several."""
        devices = {row["device"] for rows in self.rows for row in rows}
        return KEY if len(devices) > 1 else KEY[1:]

    @property
    def good(self) -> bool:
        """Whether TriGRU still has a time wherever it had one."""
        return not any(p.lost for p in self.pairs if p.a["provider"] == "trigru")

    def timed(self, provider: str) -> list[Pair]:
        """The provider's pairs with both times, the worst first."""
        pairs = [p for p in self.pairs if p.timed and p.a["provider"] == provider]
        return sorted(pairs, key=lambda p: p.speedup)


def compare(a: Path, b: Path) -> Comparison:
    """Match the rows of two sweeps. Rows of different devices do not match."""
    of_a, of_b = ({_cells(row, KEY): row for row in read_rows(path)} for path in (a, b))
    return Comparison(
        (a, b),
        (list(of_a.values()), list(of_b.values())),
        [Pair(row, of_b[key]) for key, row in of_a.items() if key in of_b],
        (
            [row for key, row in of_a.items() if key not in of_b],
            [row for key, row in of_b.items() if key not in of_a],
        ),
    )


def read_rows(path: Path) -> list[Row]:
    """The rows of a sweep's CSV file. Raises ValueError if it is another kind of file."""
    columns, rows = read_csv(path)
    if columns != COLUMNS:
        raise ValueError(f"{path} is not a sweep's: its columns are {columns}")
    return rows


def report(comparison: Comparison) -> str:
    """What changed, the worst first, and a short summary last."""
    parts = (
        _header(comparison), _statuses(comparison), _times(comparison),
        _changes(comparison, "peak_bytes", "Peak bytes", BYTES_BEYOND, ",.0f"),
        _changes(comparison, "max_rel_err", "The largest error", ERROR_BEYOND, ".2e"),
        _only(comparison), _control(comparison), _summary(comparison),
    )  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part)


def table(head: Line, lines: Iterable[Line]) -> list[str]:
    """Lines of aligned columns, those of numbers to the right."""
    lines = [head, *lines]
    columns = []
    for cells in zip(*lines, strict=True):
        width = max(map(len, cells))
        to_right = all(cell[:1].isdigit() or cell == "-" for cell in cells[1:])
        columns.append([cell.rjust(width) if to_right else cell.ljust(width) for cell in cells])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def _header(comparison: Comparison) -> list[str]:
    """Where, with what and when both were measured, and what of it forbids conclusions."""
    known = {k: [unique(r[k] for r in rows if r[k]) for rows in comparison.rows] for k in FACTS}
    said = {k: [", ".join(v) for v in both] for k, both in known.items() if any(both)}
    said |= {"date": [max(dates, default="") for dates in known["date"]]}
    said = {"file": [str(path) for path in comparison.paths]} | said
    lines = table(("", "A", "B"), [(k, *both) for k, both in said.items()])
    for name, devices in zip("AB", known["device"], strict=True):
        if len(devices) > 1:
            lines.append(f"WARNING: {name} holds rows of {len(devices)} devices.")
    if set(known["device"][0]) != set(known["device"][1]):
        lines.append(
            "WARNING: the devices differ. Rows of different devices are not comparable, and count "
            "as rows that only one file has."
        )
    differ = [k for k in VERSIONS if set(known[k][0]) != set(known[k][1])]
    if differ:
        lines.append(
            f"WARNING: {', '.join(differ)} differ: they may be what changed, for all providers."
        )
    return lines


def _statuses(comparison: Comparison) -> list[str]:
    """Statuses that changed: those that lost their time first, those that gained one last."""

    def rank(pair: Pair) -> tuple[int, bool]:
        gained = timed(pair.b) and not timed(pair.a)
        return 0 if pair.lost else 2 if gained else 1, pair.a["provider"] != "trigru"

    changed = sorted((p for p in comparison.pairs if _status_changed(p)), key=rank)
    if not changed:
        return []
    columns = comparison.columns
    lines = [
        (*_cells(p.a, columns), " → ".join(textwrap.shorten(row["status"], 80) for row in p))
        for p in changed
    ]
    return [f"STATUS changed ({len(changed)}):", *table((*columns, "status"), lines)]


def _status_changed(pair: Pair) -> bool:
    """Of rows without a time only the kind of failure counts, not its numbers."""
    a, b = pair.a["status"], pair.b["status"]
    if timed(pair.a) or timed(pair.b):
        return a != b or not pair.timed
    return a.partition(":")[0] != b.partition(":")[0]


def _times(comparison: Comparison) -> list[str]:
    """TriGRU's rows that are faster or slower, and how the other providers did there."""
    moved = [p for p in comparison.timed("trigru") if p.moved]
    if not moved:
        return []
    columns = [k for k in comparison.columns if k != "provider"]
    others: dict[Line, list[float]] = {}
    for p in comparison.pairs:
        if p.timed and p.a["provider"] != "trigru":
            others.setdefault(_cells(p.a, columns), []).append(p.speedup)
    lines = []
    for p in moved:
        cells = _cells(p.a, columns)
        control = f"{geometric_mean(others[cells]):.3f}×" if cells in others else "-"
        times = (f"{row['p50_us']:,.1f}" for row in p)
        lines.append((f"{p.speedup:.3f}×", control, *times, *cells))
    return [
        f"TriGRU faster or slower ({len(moved)}); speed-up: time of A over time of B; others: the "
        "other providers' there:",
        *table(("speed-up", "others", "A µs", "B µs", *columns), lines),
    ]


def _changes(comparison: Comparison, column: str, name: str, beyond: float, form: str) -> list[str]:
    """Where a column became larger or smaller by more than a ratio, the largest increase first."""
    both = [p for p in comparison.pairs if None not in (p.a[column], p.b[column])]
    changed = [
        p for p in both if p.b[column] > beyond * p.a[column] or p.a[column] > beyond * p.b[column]
    ]
    if not changed:
        return []

    def ratio(pair: Pair) -> float:
        return pair.b[column] / pair.a[column] if pair.a[column] else math.inf

    columns = comparison.columns
    lines = [
        (f"{ratio(p):.3f}×", *(format(row[column], form) for row in p), *_cells(p.a, columns))
        for p in sorted(changed, key=ratio, reverse=True)
    ]
    return [
        f"{name} changed by more than {beyond:g}× ({len(changed)}); ratio: B over A:",
        *table(("ratio", "A", "B", *columns), lines),
    ]


def _only(comparison: Comparison) -> list[str]:
    """The rows that only one file has, counted for each device, variant and dtype, with the values
    that the other columns take."""
    lines = []
    for file, rows in zip("AB", comparison.only, strict=True):
        for group in unique(_cells(row, GROUP) for row in rows):
            alike = [row for row in rows if _cells(row, GROUP) == group]
            values = (sorted({row[k] for row in alike}) for k in comparison.columns)
            lines.append((file, str(len(alike)), *(",".join(map(_cell, v)) for v in values)))
    if not lines:
        return []
    a, b = map(len, comparison.only)
    head = ("file", "rows", *comparison.columns)
    return [f"Only in one file ({a} rows of A, {b} rows of B):", *table(head, lines)]


def _control(comparison: Comparison) -> list[str]:
    """What the providers other than TriGRU say about the machine: their speed-up's geometric mean
    and spread, and a warning where single rows or most of them moved."""
    lines, moves = [], []
    names = unique(p.a["provider"] for p in comparison.pairs if p.timed)
    for name in (name for name in names if name != "trigru"):
        pairs = comparison.timed(name)
        ratios = [p.speedup for p in pairs]
        mean = geometric_mean(ratios)
        low, _, high = percentiles(ratios) if len(ratios) > 1 else (mean, mean, mean)
        cells = (f"{ratio:.3f}×" for ratio in (mean, low, high))
        lines.append((name, str(len(pairs)), *map(str, _counts(pairs)), *cells))
        moved = [p.speedup for p in pairs if p.moved]
        if moved:
            moves.append(
                f"WARNING: {len(moved)} of {len(pairs)} rows of {name} moved beyond their noise, "
                f"{moved[0]:.3f}× to {moved[-1]:.3f}×: a change of TriGRU of that size means "
                "nothing."
            )
        if len(ratios) > 1 and not low <= 1 <= high:
            moves.append(
                f"WARNING: {name} as a whole moved, {mean:.3f}×: a change of TriGRU of that size "
                "means nothing, nor does a mean that close to 1."
            )
    if not lines:
        return ["WARNING: no control: nothing says how much the machine itself changed."]
    head = ("control", "rows", "faster", "slower", "same", "mean", "p20", "p80")
    return [*table(head, lines), *moves]


def _summary(comparison: Comparison) -> list[str]:
    lost = sum(p.lost for p in comparison.pairs if p.a["provider"] == "trigru")
    lines = [f"TriGRU LOST ITS TIME in {lost} rows: see the statuses."] if lost else []
    pairs = comparison.timed("trigru")
    if not pairs:
        return [*lines, "TriGRU: no row has a time in both files."]
    mean = geometric_mean(p.speedup for p in pairs)
    faster, slower, same = _counts(pairs)
    lines.append(
        f"TriGRU: {faster} faster, {slower} slower, {same} the same within noise; "
        f"geometric mean {mean:.3f}×"
    )
    for name, p in (("worst", pairs[0]), ("best", pairs[-1])):
        noise = "" if p.moved else " (within noise)"
        shape = " ".join(p.a[k] if k in TEXT else f"{k}={_cell(p.a[k])}" for k in SHAPE)
        lines.append(f"{name:5} {p.speedup:.3f}×{noise}: {shape}")
    return lines


def _counts(pairs: Sequence[Pair]) -> tuple[int, int, int]:
    """How many are faster, slower and the same."""
    faster, slower = sum(p.faster for p in pairs), sum(p.slower for p in pairs)
    return faster, slower, len(pairs) - faster - slower


def _cells(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(_cell(row[k]) for k in columns)


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.0f}"
