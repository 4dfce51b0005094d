"""What the rows of a CSV file come to, in the numbers and words that pictures and README share."""

import csv
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .measure import FACTS
from .shapes import MODES

TEXT = {
    *FACTS, "provider", "variant", "mode", "dtype", "run", "status", "result",
}  # fmt: skip
SHAPE = ("variant", "mode", "dtype", "T", "B", "I", "H", "layers", "directions", "packed")
CASE = ("device", *SHAPE)
DTYPES = ("bf16", "fp16", "tf32", "fp32")
YARDSTICKS = {"torch": ("cudnn", "aten"), "textbook": ("eager",)}
NAMES = {
    "trigru": "TriGRU",
    "cudnn": "nn.GRU (cuDNN)",
    "aten": "nn.GRU (ATen)",
    "eager": "a plain torch loop",
    "compiled": "a compiled torch loop",
    "flashrnn": "FlashRNN",
    "torchrl": "TorchRL",
    "persistent": "cuDNN's persistent kernel",
}
SHORT = {"cudnn": "cuDNN", "aten": "nn.GRU", "eager": "loop"}
MOST_PEERS = 6  # shapes in a panel

Row = dict[str, Any]
Speedups = dict[tuple[float, float], float | str]  # of TriGRU by (H, B), or why there is none


def read_csv(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """The columns and the rows of a CSV file; what is not text is a number, or None if empty.

    Raises ValueError if a row is incomplete."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        for row in reader:
            if len(row) != len(columns) or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: not as many cells as columns")
            rows.append({k: v if k in TEXT else _number(v) for k, v in row.items()})
    return columns, rows


def latest(rows: Iterable[Row], columns: Sequence[str] = CASE) -> list[Row]:
    """Of rows that measure the same, the last one."""
    return list({tuple(r[c] for c in (*columns, "provider")): r for r in rows}.values())


def group(rows: Iterable[Row], *columns: str) -> dict[tuple, list[Row]]:
    """The rows by their values of the columns, in the order in which they appear."""
    groups: dict[tuple, list[Row]] = {}
    for r in rows:
        groups.setdefault(tuple(r[c] for c in columns), []).append(r)
    return groups


def yardstick(rows: Sequence[Row]) -> str:
    """The provider that TriGRU is compared with in rows of one variant."""
    names = YARDSTICKS[rows[0]["variant"]]
    there = {r["provider"] for r in rows}
    return next((name for name in names if name in there), names[0])


def timed(row: Row | None) -> bool:
    return row is not None and row["p50_us"] is not None


def label(row: Row) -> str:
    """A word or two on how it went: "ok", "wrong", "no kernel", "error", …"""
    word = row["status"].partition(":")[0]
    return "not timed" if word == "ok" and not timed(row) else word


def pair(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """The rows of TriGRU and of its yardstick among rows of one case."""
    found = {r["provider"]: r for r in rows}
    return found.get("trigru"), found.get(yardstick(rows))


def plain(rows: Sequence[Row]) -> list[Row]:
    """One layer in one direction, not packed, at the commonest T, the longest of them."""
    rows = [r for r in rows if is_single(r)]
    count = Counter(r["T"] for r in rows)
    commonest = max(count, key=lambda T: (count[T], T), default=None)
    return [r for r in rows if r["T"] == commonest]


def is_single(row: Row) -> bool:
    """Whether it is of one layer in one direction and not packed."""
    return (row["layers"], row["directions"], row["packed"]) == (1, 1, 0)


def distinct(rows: Sequence[Row]) -> list[Row]:
    """Without fp16 beside bf16, whose pictures it would repeat; the heatmap has both."""
    repeated = "fp16" if any(r["dtype"] == "bf16" for r in rows) else ""
    return [r for r in rows if r["dtype"] != repeated]


def speedups(rows: Sequence[Row]) -> Speedups:
    """By (H, B) the yardstick's median time over TriGRU's, from rows that differ in nothing else;
    or in a word or two why there is none."""
    found: Speedups = {}
    for shape, alike in group(rows, "H", "B").items():
        us, them = pair(alike)
        if us and them and timed(us) and timed(them):
            found[shape] = them["p50_us"] / us["p50_us"]
        elif us:
            found[shape] = f"no {SHORT[yardstick(rows)]}" if timed(us) else label(us)
    return found


def ratios(speeds: Speedups) -> dict[tuple[float, float], float]:
    """The speed-ups that there are."""
    return {shape: s for shape, s in speeds.items() if not isinstance(s, str)}


def losses(speeds: Speedups) -> dict[tuple[float, float], float]:
    """The speed-ups that are none."""
    return {shape: s for shape, s in ratios(speeds).items() if s < 1}


def summary(speeds: Speedups) -> str:
    """In how many shapes TriGRU is slower."""
    return f"slower in {len(losses(speeds))} of {len(ratios(speeds))} shapes"


def times(ratio: float) -> str:
    """A ratio as people read it: two digits after the point where they tell a loss from a gain."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def throughput(row: Row, us: float) -> float:
    """Batch-steps per second."""
    return row["B"] * row["T"] / us * 1e6


def relative_times(rows: Sequence[Row]) -> dict[tuple[float, float], dict[str, list[float]]]:
    """By (layers, directions), other than one of each, and provider: the times relative to one
    layer in one direction, of each shape where both are timed."""
    found: dict[tuple[float, float], dict[str, list[float]]] = {}
    for (provider, *_), alike in group(rows, "provider", "T", "B", "I", "H", "packed").items():
        us = {(r["layers"], r["directions"]): r["p50_us"] for r in alike if timed(r)}
        one = us.pop((1, 1), None)
        for depth in us if one else ():
            found.setdefault(depth, {}).setdefault(provider, []).append(us[depth] / one)
    return dict(sorted(found.items()))


def memory_ratios(rows: Sequence[Row]) -> list[float]:
    """TriGRU's peak memory over the yardstick's in each case where both are known."""
    pairs = [pair(alike) for alike in group(rows, *CASE).values()]
    return [
        us["peak_bytes"] / them["peak_bytes"]
        for us, them in pairs
        if us and them and us["peak_bytes"] and them["peak_bytes"]
    ]


def crowded(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case in which more than two providers are timed, TriGRU among them; of many
    cases those with the most."""
    cases = [c for c in group(rows, *CASE).values() if timed(pair(c)[0]) and timed_in(c) > 2]
    cases = sorted(cases, key=timed_in, reverse=True)[:MOST_PEERS]
    return sorted(cases, key=lambda case: (case[0]["T"], case[0]["H"], case[0]["B"]))


def exceeding(rows: Sequence[Row]) -> list[Row]:
    """TriGRU's results whose error is larger than allowed."""
    return [r for r in rows if r["provider"] == "trigru" and not r["rel_err"] <= r["allowed"]]


def spread(values: Iterable[float], most: int) -> list[float]:
    """At most so many of the values, from the smallest to the largest at equal distances."""
    every = sorted(set(values))
    count = min(most, len(every))
    return unique(every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count))


def remarks(rows: Sequence[Row]) -> list[str]:
    """What was not timed, or not as it should be, and why, in a few lines."""
    odd = [
        r | {"why": r["status"] if timed(r) else label(r)}
        for r in rows
        if not timed(r) or r["status"] != "ok"
    ]
    kinds = sorted(group(odd, "provider", "why").items(), key=lambda kind: kind[0][0] != "trigru")
    said = []
    for (provider, _), alike in kinds[:4]:
        where = "; ".join(
            [", ".join(unique(r["dtype"] for r in alike))]
            + [f"{k} = {listed(r[k] for r in alike)}" for k in "BH"]
        )
        status = textwrap.shorten(alike[0]["status"].removeprefix("ok: "), 150)
        about = "Remark on" if timed(alike[0]) else "No time for"
        said.append(f"{about} {NAMES[provider]} ({where}; {len(alike)} in all): {status}")
    more = [f"More of the kind in the CSV file: {len(kinds) - 4}."] if len(kinds) > 4 else []
    return [*said, *more]


def in_order(rows: Iterable[Row], *columns: str) -> list[tuple[tuple, list[Row]]]:
    """Groups by dtype, or by dtype and mode, in the usual order of both."""
    order, groups = (*DTYPES, *MODES), group(rows, *columns)
    return sorted(groups.items(), key=lambda item: [order.index(word) for word in item[0]])


def timed_in(rows: Sequence[Row]) -> int:
    """How many."""
    return sum(map(timed, rows))


def listed(values: Iterable[float]) -> str:
    """Every value once, from the smallest on."""
    return ", ".join(f"{v:.0f}" for v in sorted(set(values)))


def unique(values: Iterable[Any]) -> list[Any]:
    """Every value once, in the order in which they appear."""
    return list(dict.fromkeys(values))


def _number(text: str) -> float | None:
    return float(text) if text else None
