"""Pictures of a sweep and of an accuracy measurement: TriGRU beside its yardstick."""

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, NullLocator

from .plot import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINE,
    PINK,
    RED,
    SKY,
    STYLE,
    WIDTH,
    save,
)
from .rows import (
    MOST_PEERS,
    NAMES,
    Row,
    Speedups,
    crowded,
    distinct,
    exceeding,
    group,
    in_order,
    is_single,
    latest,
    listed,
    losses,
    memory_ratios,
    plain,
    relative_times,
    remarks,
    speedups,
    spread,
    summary,
    throughput,
    timed,
    timed_in,
    times,
    unique,
    yardstick,
)

COLOURS = (BLUE, GREEN, PINK, BLACK)  # of batch sizes; RED is kept for losses
MARKERS = "osD^"
TITLE_LINE = 46  # characters of a picture's title that fit into WIDTH
SATURATED = 4.0  # the speed-up from which on the heatmap's colour is the same
TICKS = (1, 1.5, 2, 3, 4, 5, 7)  # where an axis has less than a decade

Panel = tuple[str, Callable[[Axes], None]]  # its title, and what draws it


def plot_sweep(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """The pictures of each variant, as far as there are data for them. Of rows that measure the
    same, the last one counts."""
    several = len({r["device"] for r in rows}) > 1
    paths = []
    for (device, variant), chosen in group(latest(rows), "device", "variant").items():
        two = [r for r in chosen if r["provider"] in ("trigru", yardstick(chosen))]
        for kind, draw, shown in (
            ("throughput", _throughput, two), ("heatmap", _heatmap, two), ("time", _time, two),
            ("scaling", _scaling, two), ("memory", _memory, two), ("peers", _peers, chosen),
        ):  # fmt: skip
            parts = [stem, *([_slug(device)] if several else []), kind, variant]
            paths += draw(shown, folder / ("-".join(parts) + ".png"))
    return paths


def plot_accuracy(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """For each variant the relative errors of all results, a panel for each dtype."""
    several = len({r["device"] for r in rows}) > 1
    rows = latest(rows, ("device", "variant", "dtype", "T", "B", "I", "H", "result"))
    paths = []
    for (device, variant), chosen in group(rows, "device", "variant").items():
        parts = [stem, *([_slug(device)] if several else []), variant]
        panels: list[Panel] = []
        for (dtype,), panel in in_order(chosen, "dtype"):
            ours = sum(r["provider"] == "trigru" for r in panel)
            title = f"{dtype}: {len(exceeding(panel))} of {ours} results over what is allowed"
            panels.append((title, partial(_errors, rows=panel)))
        lengths = listed(r["T"] for r in chosen)
        note = (
            "Largest distance of each result from float64's, relative to its largest exact value; "
            f"d is the gradient in what follows. B = {listed(r['B'] for r in chosen)}; in each "
            f"group from left to right T = {lengths}, each with "
            f"H = {listed(r['H'] for r in chosen)}."
        )
        over = [
            f"Over: {r['dtype']} {r['result']}, T = {r['T']:.0f}, B = {r['B']:.0f}, "
            f"H = {r['H']:.0f}: {r['rel_err']:.1e}, allowed {r['allowed']:.1e}"
            for r in exceeding(chosen)[:4]
        ]
        path = folder / ("-".join(parts) + ".png")
        odd = [f"{NAMES[r['provider']]}: {r['status']}" for r in chosen if r["status"] != "ok"]
        notes = [note, *over, *unique(odd)]
        paths += _draw(path, chosen, "Error of TriGRU and {}", panels, notes)
    return paths


def _throughput(rows: Sequence[Row], path: Path) -> list[Path]:
    """Throughput over H, both at some B, with the shapes where TriGRU is slower."""
    rows = distinct(plain(rows))
    panels: list[Panel] = []
    for (dtype, mode), panel in in_order(rows, "dtype", "mode"):
        title = f"{dtype}, {mode}: {summary(speedups(panel))}"
        panels.append((title, partial(_throughputs, rows=panel)))
    note = (
        "Points: B · T over the median time. Bands: p20 to p80. Rings: TriGRU is slower, also at a "
        "B without a line. Training is forward and backward."
    )
    return _draw(path, rows, "Throughput of TriGRU and {}", panels, [note, *remarks(rows)])


def _throughputs(axes: Axes, rows: Sequence[Row]) -> None:
    batches = spread((r["B"] for r in rows), 4)
    handles = _lines(axes, rows, "H", throughput, batches)
    hidden = sorted({r["H"] for r in rows})
    lost = losses(speedups(rows))
    points = [
        (hidden.index(r["H"]), throughput(r, r["p50_us"]))
        for r in rows
        if r["provider"] == "trigru" and (r["H"], r["B"]) in lost
    ]
    if points:
        handles += axes.plot(
            *zip(*points, strict=True), "o", color=RED, markersize=17, markeredgewidth=3,
            markerfacecolor="none", label="slower",
        )  # fmt: skip
    _log(axes, EngFormatter(sep=""))
    axes.set_ylabel("batch-steps per second")
    _legend(axes, handles)


def _heatmap(rows: Sequence[Row], path: Path) -> list[Path]:
    """The speed-up of every H and B."""
    rows = plain(rows)
    panels: list[Panel] = []
    for (dtype, mode), panel in in_order(rows, "dtype", "mode"):
        speeds = speedups(panel)
        if speeds:
            title = f"{dtype}, {mode}: {summary(speeds)}"
            panels.append((title, partial(_cells, speeds=speeds)))
    note = (
        "Ratio of median times. Blue: TriGRU is faster. Red, bold, in a frame: slower. "
        "Hatched: not measured, and why."
    )
    return _draw(path, rows, "Speed of TriGRU relative to {}", panels, [note, *remarks(rows)])


def _cells(axes: Axes, speeds: Speedups) -> None:
    hidden, batches = (sorted({shape[i] for shape in speeds}) for i in (0, 1))
    colours = matplotlib.colormaps["RdBu"]
    norm = TwoSlopeNorm(0, -math.log(SATURATED), math.log(SATURATED))
    for y, H in enumerate(hidden):
        for x, B in enumerate(batches):
            value = speeds.get((H, B), "–")
            corner = (x - 0.5, y - 0.5)
            if isinstance(value, str):
                axes.add_patch(
                    Rectangle(corner, 1, 1, facecolor="white", edgecolor="#CCCCCC", hatch="///")
                )
                axes.text(
                    x, y, textwrap.fill(value, 9), ha="center", va="center", fontsize=12,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )  # fmt: skip
                continue
            place = norm(max(-math.log(SATURATED), min(math.log(SATURATED), math.log(value))))
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colours(place), edgecolor="white"))
            if value < 1:
                axes.add_patch(
                    Rectangle(
                        (x - 0.45, y - 0.43), 0.9, 0.86, facecolor="none", edgecolor=BLACK,
                        linewidth=3,
                    )
                )  # fmt: skip
            axes.text(
                x, y, times(value), ha="center", va="center", fontsize=15,
                color="white" if abs(place - 0.5) > 0.3 else BLACK,
                weight="bold" if value < 1 else "normal",
            )  # fmt: skip
    axes.set_xticks(range(len(batches)), [f"{B:.0f}" for B in batches])
    axes.set_yticks(range(len(hidden)), [f"{H:.0f}" for H in hidden])
    axes.set(
        xlim=(-0.5, len(batches) - 0.5), ylim=(len(hidden) - 0.5, -0.5), xlabel="batch size B",
        ylabel="hidden size H",
    )  # fmt: skip
    axes.grid(False)


def _time(rows: Sequence[Row], path: Path) -> list[Path]:
    """Time per step over H, both at some B, and the floor."""
    rows = distinct(plain(rows))
    panels: list[Panel] = [
        (f"{dtype}, {mode}", partial(_steps, rows=panel, over="H"))
        for (dtype, mode), panel in in_order(rows, "dtype", "mode")
    ]
    note = "Points: medians. Bands: p20 to p80."
    if any(r["floor_us"] for r in rows):
        note += " Floor: what bytes, FLOPs and the steps of TriGRU's plan take at least."
    return _draw(path, rows, "Time per step of TriGRU and {}", panels, [note, *remarks(rows)])


def _steps(axes: Axes, rows: Sequence[Row], over: str) -> None:
    batches = spread((r["B"] for r in rows), 3)
    handles = _lines(axes, rows, over, lambda r, us: us / r["T"], batches)
    places = sorted({r[over] for r in rows})
    for i, B in enumerate(batches):
        floors = {r[over]: r["floor_us"] / r["T"] for r in rows if r["B"] == B and r["floor_us"]}
        if floors:
            ys = [floors.get(place, math.nan) for place in places]
            axes.plot(range(len(places)), ys, ":", color=COLOURS[i], linewidth=4)
    if any(r["floor_us"] for r in rows):
        handles.append(Line2D([], [], linestyle=":", color=GREY, linewidth=4, label="floor"))
    _log(axes, FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_ylabel("µs per time step")
    _legend(axes, handles)


def _scaling(rows: Sequence[Row], path: Path) -> list[Path]:
    """Time per step over T, and time over layers and directions."""
    rows = distinct(rows)
    # A batch of few lengths has little to show over T, and an H whose batches have one nothing.
    lengths: dict[float, dict[float, set[float]]] = {}
    for r in filter(is_single, rows):
        lengths.setdefault(r["H"], {}).setdefault(r["B"], set()).add(r["T"])
    several = {H: sum(len(Ts) - 1 for Ts in by_B.values()) for H, by_B in lengths.items()}
    panels: list[Panel] = []
    used: list[Row] = []
    if any(several.values()):
        H = max(several, key=lambda H: (several[H], H))
        most = max(map(len, lengths[H].values()))
        many = {B for B, Ts in lengths[H].items() if len(Ts) > most / 2}
        over_T = [r for r in rows if is_single(r) and r["H"] == H and r["B"] in many]
        used += over_T
        panels += [
            (f"{dtype}, {mode}, H = {H:.0f}: over T", partial(_steps, rows=panel, over="T"))
            for (dtype, mode), panel in in_order(over_T, "dtype", "mode")
            if len({r["T"] for r in panel}) > 1
        ]
    for (dtype, mode), panel in in_order(rows, "dtype", "mode"):
        if relative_times(panel):
            title = f"{dtype}, {mode}: over layers, directions"
            panels.append((title, partial(_depths, rows=panel)))
            used += [r for r in panel if (r["layers"], r["directions"]) != (1, 1)]
    note = (
        "Over T: medians with bands from p20 to p80; a time per step that does not depend on T is "
        "a flat line. Over layers and directions: time relative to one layer in one direction of "
        "the same shape; bars are medians over shapes, thin lines from the least to the most."
    )
    return _draw(path, used, "How TriGRU and {} scale", panels, [note, *remarks(used)])


def _depths(axes: Axes, rows: Sequence[Row]) -> None:
    relative, other = relative_times(rows), yardstick(rows)
    for x, (depth, by_provider) in enumerate(relative.items()):
        for side, provider in ((-0.2, "trigru"), (0.2, other)):
            every = by_provider.get(provider)
            if every:
                middle = statistics.median(every)
                axes.bar(x + side, middle, 0.38, color=BLUE if provider == "trigru" else SKY)
                reach = [[middle - min(every)], [max(every) - middle]]
                axes.errorbar(x + side, middle, reach, color=GREY, capsize=6, capthick=2)
                axes.text(x + side, max(every), times(middle), ha="center", va="bottom")
        axes.hlines(math.prod(depth), x - 0.45, x + 0.45, color=BLACK, linestyle=":", linewidth=3)
    kinds = ("layers", "directions")
    words = [
        " ".join(f"{n:.0f} {word}" for n, word in zip(depth, kinds, strict=True) if n > 1)
        for depth in relative
    ]
    axes.set_xticks(range(len(words)), [textwrap.fill(w, 12) for w in words])
    axes.set_xlim(-0.5, len(words) - 0.5)
    axes.margins(y=0.15)
    axes.set_axisbelow(True)
    axes.set_ylabel("relative time")
    _legend(
        axes,
        [Rectangle((0, 0), 1, 1, color=BLUE, label=NAMES["trigru"]),
         Rectangle((0, 0), 1, 1, color=SKY, label=NAMES[other]),
         Line2D([], [], color=BLACK, linestyle=":", linewidth=3, label="as many times the work")],
    )  # fmt: skip


def _memory(rows: Sequence[Row], path: Path) -> list[Path]:
    """Peak memory of training over H, both at some B."""
    rows = [r for r in distinct(plain(rows)) if r["mode"] == "training"]
    rows = [r for r in rows if timed(r) and r["peak_bytes"]]
    panels: list[Panel] = []
    for (dtype, _), panel in in_order(rows, "dtype", "mode"):
        ratios = memory_ratios(panel)
        said = f": TriGRU's is {times(min(ratios))} to {times(max(ratios))}" if ratios else ""
        panels.append((f"{dtype}, training{said}", partial(_mebibytes, rows=panel)))
    note = "The most memory held at once during a training step above what was held before it."
    return _draw(path, rows, "Peak memory of TriGRU and {}", panels, [note])


def _mebibytes(axes: Axes, rows: Sequence[Row]) -> None:
    batches = spread((r["B"] for r in rows), 3)
    handles = _lines(axes, rows, "H", lambda r, us: r["peak_bytes"] / 2**20, batches)
    _log(axes, FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_ylabel("MiB")
    _legend(axes, handles)


def _peers(rows: Sequence[Row], path: Path) -> list[Path]:
    """Time of all providers where there are more than two."""
    panels: list[Panel] = []
    used: list[Row] = []
    most = 0  # lines in a panel
    for (dtype, mode), panel in in_order(rows, "dtype", "mode"):
        cases = crowded(panel)
        if cases:
            panels.append((f"{dtype}, {mode}", partial(_bars, cases=cases)))
            used += [r for case in cases for r in case]
            most = max(most, sum(timed_in(case) + 2 for case in cases))
    note = (
        "Bars: median time relative to TriGRU's. Numbers: µs per time step. "
        f"Of many shapes the {MOST_PEERS} where most were timed; the others are in the CSV file."
    )
    height = 1.6 + 0.32 * most
    notes = [note, *remarks(used)]
    return _draw(path, used, "Time of TriGRU, {} and others", panels, notes, height)


def _bars(axes: Axes, cases: Sequence[Sequence[Row]]) -> None:
    y, ticks = 0, []
    for case in cases:
        first, unit = case[0], next(r["p50_us"] for r in case if r["provider"] == "trigru")
        shape = f"H = {first['H']:.0f}, B = {first['B']:.0f}, T = {first['T']:.0f}"
        axes.text(0, y, shape, weight="bold", va="center")
        for r in sorted(filter(timed, case), key=lambda r: r["p50_us"]):
            y += 1
            ticks.append((y, NAMES[r["provider"]]))
            ratio = r["p50_us"] / unit
            axes.barh(y, ratio, 0.8, color=BLUE if r["provider"] == "trigru" else SKY)
            text = f" {r['p50_us'] / r['T']:.3g} µs, {times(ratio)}"
            axes.text(ratio, y, text, va="center", fontsize=15)
        y += 2
    axes.set_yticks(*zip(*ticks, strict=True), fontsize=15)
    axes.set_ylim(y - 1, -1)
    axes.margins(x=0.35)
    axes.set_xlabel("time relative to TriGRU's")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)


def _errors(axes: Axes, rows: Sequence[Row]) -> None:
    other = yardstick(rows)
    results = unique(r["result"] for r in rows)
    cases = sorted({(r["T"], r["H"], r["B"]) for r in rows})
    handles = []
    for provider, column, look in (
        ("trigru", "allowed", {"color": RED, "marker": "_", "label": "allowed"}),
        (other, "rel_err", {"color": GREY, "marker": "s", "mfc": "white", "label": NAMES[other]}),
        ("trigru", "rel_err", {"color": BLUE, "marker": "o", "ms": 6, "label": NAMES["trigru"]}),
    ):
        points = [
            (
                results.index(r["result"])
                + 0.8 * (cases.index((r["T"], r["H"], r["B"])) + 0.5) / len(cases),
                r[column],
            )
            for r in rows
            if r["provider"] == provider
        ]
        handles += axes.plot(*zip(*points, strict=True), linestyle="none", **look)
    axes.set_yscale("log")
    axes.set_xticks(
        [i + 0.4 for i in range(len(results))], [_short(r) for r in results], fontsize=14
    )
    axes.set_xlim(-0.2, len(results))
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("relative error")
    _legend(axes, handles[::-1])


def _draw(
    path: Path, rows: Sequence[Row], title: str, panels: Sequence[Panel], notes: Sequence[str],
    height: float = 5.4,
) -> list[Path]:  # fmt: skip
    """One panel under the other, so many inches each, and the small print, if there are panels."""
    if not panels:
        return []
    lengths = {r["T"] for r in rows}
    second = f"{rows[0]['variant']} variant" + (f", T = {min(lengths):.0f}" * (len(lengths) == 1))
    question = textwrap.fill(title.format(NAMES[yardstick(rows)]), TITLE_LINE)
    small = sum(len(note) // LINE + 1 for note in notes) + 4  # lines
    with plt.rc_context(STYLE):
        figure, all_axes = plt.subplots(
            len(panels), 1, figsize=(WIDTH, 1.2 + 0.22 * small + height * len(panels)),
            layout="constrained", squeeze=False,
        )  # fmt: skip
        for axes, (name, draw) in zip(all_axes[:, 0], panels, strict=True):
            draw(axes)
            axes.set_title(name)
        figure.suptitle(f"{question}\n{second}", fontsize=20)
        return [save(figure, rows, path, "\n".join(notes))]


def _lines(
    axes: Axes, rows: Sequence[Row], over: str, value: Callable[[Row, float], float],
    batches: Sequence[float],
) -> list[Line2D]:  # fmt: skip
    """Lines of `value(row, its µs)` over H or T with a band from p20 to p80, TriGRU's solid and the
    yardstick's dashed, one colour for each B; the legend's entries."""
    other = yardstick(rows)
    places = sorted({r[over] for r in rows})
    looks: dict[str, dict] = {"trigru": {}, other: {"linestyle": "--", "markerfacecolor": "white"}}
    for i, B in enumerate(batches):
        for provider, look in looks.items():
            found = {
                r[over]: r for r in rows if (r["provider"], r["B"]) == (provider, B) and timed(r)
            }
            low, middle, high = (
                [value(found[p], found[p][us]) if p in found else math.nan for p in places]
                for us in ("p20_us", "p50_us", "p80_us")
            )
            xs = range(len(places))
            axes.plot(xs, middle, color=COLOURS[i], marker=MARKERS[i], **look)
            axes.fill_between(xs, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
    axes.set_xticks(range(len(places)), [f"{place:.0f}" for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel({"H": "hidden size H", "T": "steps T"}[over])
    return [
        *(
            Line2D([], [], color=COLOURS[i], marker=MARKERS[i], label=f"B = {B:.0f}")
            for i, B in enumerate(batches)
        ),
        *(Line2D([], [], color=GREY, label=NAMES[name], **look) for name, look in looks.items()),
    ]


def _log(axes: Axes, formatter: Formatter) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1,) if high / low > 300 else (1, 2, 5) if high / low > 10 else TICKS)
    )
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes, handles: Sequence[Artist]) -> None:
    axes.legend(
        handles=handles, frameon=False, fontsize=14, ncols=4, columnspacing=1, handlelength=1.8,
        loc="upper center", bbox_to_anchor=(0.45, -0.16),
    )  # fmt: skip


def _short(result: str) -> str:
    """dweight_ih_l0 → dW_ih"""
    return result.replace("weight", "W").replace("bias", "b").removesuffix("_l0")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
