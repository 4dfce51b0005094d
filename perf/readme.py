"""README's account of the evidence, written from the files in perf/results alone."""

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .measure import kernel_hash
from .rows import (
    DTYPES,
    NAMES,
    Row,
    Speedups,
    group,
    label,
    latest,
    plain,
    ratios,
    read_csv,
    speedups,
    summary,
    timed,
    times,
    yardstick,
)
from .shapes import MODES, VARIANTS

START, END = "<!-- evidence -->", "<!-- /evidence -->"
NOT_YET = """\
**Status: not yet run on a GPU.** The kernels give right numbers in an emulator that executes what
Triton compiles of them, whole launches at once, with checks of memory, races, barriers and the
exchange's protocol, for sm_80 and sm_90; and they compile for sm_80, sm_86, sm_90, sm_100 and
sm_120 (without spills for the shapes listed in `tests/test_compile.py`). What no GPU has
confirmed yet: every statement about speed and memory, what the machine code makes of the emulated
one, CUDA graphs, and the choice between plans, which comes from a model. `python -m perf
evidence` runs what there is to see on a GPU in one go."""
ELSEWHERE = """\
On other GPUs no kernel has run yet; they compile for sm_80, sm_86, sm_90, sm_100 and sm_120
(without spills for the shapes listed in `tests/test_compile.py`). `python -m perf evidence`
measured this, and `python -m perf plot` wrote it here and drew all pictures in `perf/results`."""
PICTURES = {
    "sweep-throughput-torch.png": "Throughput over H; rings: TriGRU is slower",
    "sweep-time-torch.png": "Time per step over H; dotted: the floor",
}


def update(readme: Path, results: Path) -> bool:
    """Put the block of `results` between README's markers; whether that changed anything."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    new = f"{before}{START}\n{block(results)}\n{END}{after}"
    if new == text:
        return False
    readme.write_text(new, encoding="utf-8")
    return True


def block(results: Path) -> str:
    """A paragraph for each GPU; tables and pictures of the one with the most measurements."""
    folders = sorted(path.parent for path in results.glob("*/sweep.csv"))
    runs = [
        (folder, rows)
        for folder in folders
        for rows in measured_in(folder)
        if rows[0]["sm"]  # a GPU's
    ]
    if not runs:
        return NOT_YET
    paragraphs = [status(rows, folder / "tests.txt") for folder, rows in runs]
    folder, rows = max(runs, key=lambda run: len(run[1]))
    paragraphs += tables(rows)
    shown = {name: says for name, says in PICTURES.items() if (folder / name).exists()}
    if shown:
        links = [f"![{says}](perf/results/{folder.name}/{name})" for name, says in shown.items()]
        paragraphs.append(
            "\n".join([_line(shown.values()), _line(["---"] * len(shown)), _line(links)])
        )
    return "\n\n".join([*paragraphs, ELSEWHERE])


def summary_of(folder: Path) -> str:
    """What the sweep and the tests in a folder come to, of each device."""
    runs = measured_in(folder) if (folder / "sweep.csv").exists() else []
    parts = [part for rows in runs for part in (status(rows, folder / "tests.txt"), *tables(rows))]
    return "\n\n".join(parts)


def measured_in(folder: Path) -> list[list[Row]]:
    """The rows of each device in a folder's sweep."""
    return list(group(latest(read_csv(folder / "sweep.csv")[1]), "device").values())


def tables(rows: Sequence[Row]) -> list[str]:
    """The speed-ups of both variants on one device."""
    of = group(rows, "variant")
    return [part for variant in VARIANTS if (variant,) in of for part in table(of[(variant,)])]


def status(rows: Sequence[Row], tests: Path) -> str:
    """Where it was measured, with which kernels, and how much of it was right."""
    ours = [r for r in rows if r["provider"] == "trigru"]
    present = {r["kernel_hash"] == kernel_hash() for r in ours}
    kernels = "the present kernels" if present == {True} else "an earlier version of the kernels"
    how = Counter(map(label, ours))
    others = ", ".join(f"{count} {word}" for word, count in how.items() if word != "ok")
    return (
        f"**Status: measured on {rows[0]['device']}** ({max(r['date'] for r in rows)[:10]}), "
        f"{'partly ' * (len(present) > 1)}with {kernels}. {test_results(tests)} "
        f"The sweep has {len(ours)} measurements of TriGRU, a shape in one mode each: right in "
        f"{how['ok']}{f' ({others})' * bool(others)}."
    )


def test_results(path: Path) -> str:
    """A sentence on what pytest says, in all the processes that the tests took."""
    if not path.exists():
        return "There is no record of the GPU tests."
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^[= ]*(\d+ \w+(?:, \d+ \w+)*) in \d", text, re.M)
    counts: Counter[str] = Counter()
    for count, word in re.findall(r"(\d+) (\w+)", " ".join(lines)):
        counts[word.removesuffix("s")] += int(count)
    said = [
        f"{counts[word]} {word}"
        for word in ("failed", "error", "passed", "skipped")
        if counts[word]
    ]
    processes = text.count("test session starts")
    troubles = []
    if not said or "KeyboardInterrupt !!!" in text or processes > max(1, len(lines)):
        troubles.append("did not all finish")
    if processes > 1 or "outcomes.Exit" in text:
        troubles.append("took the device down")
    tests = f"GPU tests: {', '.join(said)}." if said else ""
    if troubles:
        tests = f"{tests} The GPU tests {' and '.join(troubles)}.".lstrip()
    return f"**{tests}**" if troubles or counts["failed"] or counts["error"] else tests


def table(rows: Sequence[Row]) -> list[str]:
    """The speed-ups of a variant by H and B, in the first dtype that was measured, and what they
    come to; nothing if there are none."""
    rows = plain(rows)
    dtype = next((dtype for dtype in DTYPES if any(r["dtype"] == dtype for r in rows)), None)
    rows = [r for r in rows if r["dtype"] == dtype]
    two = [r for r in rows if timed(r) and r["provider"] in ("trigru", yardstick(rows))]
    speeds = {mode: speedups([r for r in rows if r["mode"] == mode]) for mode in MODES}
    if not any(speeds.values()):
        return []
    hidden, batches = (sorted({shape[i] for by in speeds.values() for shape in by}) for i in (0, 1))
    first = rows[0]
    head = (
        f"Speed relative to {NAMES[yardstick(rows)]}: {first['variant']} variant, {dtype}, "
        f"T = {first['T']:.0f}, forward / training, bold where TriGRU is slower."
    )
    lines = [_line(["H \\ B", *(f"{B:.0f}" for B in batches)]), _line(["---"] * (1 + len(batches)))]
    for H in hidden:
        cells = (" / ".join(_cell(speeds[mode].get((H, B))) for mode in MODES) for B in batches)
        lines.append(_line([f"{H:.0f}", *cells]))
    said = [f"{mode.capitalize()}: {account(by)}." for mode, by in speeds.items() if ratios(by)]
    remarks = Counter(r["status"].removeprefix("ok: ") for r in two if r["status"] != "ok")
    for remark, count in remarks.most_common(3):
        said.append(f"{count} of {len(two)} times: “{textwrap.shorten(remark, 100)}”.")
    return [head, "\n".join(lines), " ".join(said)]


def account(speeds: Speedups) -> str:
    """All speed-ups in a few words."""
    values = ratios(speeds)
    worst = min(values, key=lambda shape: values[shape])
    return (
        f"geometric mean {times(statistics.geometric_mean(values.values()))}, {summary(speeds)}, "
        f"the worst {times(values[worst])} at H = {worst[0]:.0f}, B = {worst[1]:.0f}"
    )


def _cell(speed: float | str | None) -> str:
    if speed is None or isinstance(speed, str):
        return speed or "–"
    return f"**{times(speed)}**" if speed < 1 else times(speed)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
