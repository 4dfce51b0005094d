"""`python -m perf plot`: pictures from the CSV files of training and sweep, nothing else."""

import csv
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import sweep, train

# Okabe and Ito's palette, which the colour-blind can tell apart; yellow is too pale for lines.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK)
MARKERS = "osD^vPX"
GREY = "#777777"

STYLE = {
    "font.size": 17,
    "axes.titlesize": 18,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "lines.linewidth": 2.5,
    "lines.markersize": 9,
    "figure.dpi": 100,
}
WIDTH = 9.0  # inches
TITLE_LINE = 46  # and of the title
NARROW_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)
WIDE_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20)
LINE = 90  # characters of small print that fit into WIDTH

NAMES = {
    "trigru": "TriGRU",
    "cudnn": "nn.GRU (cuDNN)",
    "aten": "nn.GRU (ATen)",
    "eager": "a plain torch loop",
}
WHAT = {"forward": "forward, no gradients", "training": "training, forward and backward"}
TEXT = {
    "device", "sm", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash", "date",
    "provider", "variant", "mode", "dtype", "run", "status",
}  # fmt: skip

Row = dict[str, Any]


def plot_csv(path: Path, folder: Path | None = None) -> list[Path]:
    """Draw the pictures of a CSV file, beside it or in `folder`; the files written.

    Raises ValueError if the file is neither a training's nor a sweep's."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        rows = [{k: v if k in TEXT else _number(v) for k, v in row.items()} for row in reader]
    folder = folder or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if columns == train.COLUMNS:
        last = [r for r in rows if r["date"] == rows[-1]["date"]]
        return [plot_training(last, folder / f"{path.stem}.png")]
    if columns == sweep.COLUMNS:
        return plot_sweep(rows, folder, path.stem)
    raise ValueError(f"{path} is neither a training's nor a sweep's: its columns are {columns}")


def plot_training(rows: Sequence[Row], path: Path) -> Path:
    """Loss in bits per character, distance from nn.GRU's loss and throughput of one training, as
    one picture."""
    looks: dict[str, dict[str, Any]] = {
        train.YARDSTICK: {"color": SKY, "linewidth": 7},
        train.TRIGRU: {"color": BLACK, "linestyle": "--", "linewidth": 2},
        train.TEXTBOOK: {"color": RED},
    }
    first = rows[0]
    with plt.rc_context(STYLE):
        figure, (losses, distances, speeds) = plt.subplots(
            3, 1, figsize=(WIDTH, 15.5), height_ratios=(5, 3, 2.4), layout="constrained"
        )
        for name, look in looks.items():
            run = [r for r in rows if r["run"] == name]
            curve = train.smoothed([r["train_bpc"] for r in run])
            losses.plot(_ends(run, curve), curve, label=name, **look)
            held_out = [(r["step"], r["heldout_bpc"]) for r in run if r["heldout_bpc"] is not None]
            # The two that should coincide: a ring around a dot.
            size, face = (13, "none") if name == train.YARDSTICK else (6, look["color"])
            losses.plot(
                *zip(*held_out, strict=True), "o", markersize=size, markerfacecolor=face,
                markeredgecolor=look["color"], markeredgewidth=2.5,
            )  # fmt: skip
        losses.set(
            title="Training loss (lines), held-out loss (dots)", ylabel="bits per character",
            xlabel="training step",
        )  # fmt: skip
        losses.legend(frameon=False)

        steps = max(r["step"] for r in rows)
        spans = sorted({0, min(train.EARLY, steps), steps})
        allowed = [train.allowed_distance(rows, last) for last in spans[1:]]
        top = max(filter(math.isfinite, [train.FLOOR, *allowed]))
        for name, label, look in (
            (train.CONTROL, "nn.GRU, weights nudged by one rounding", {"color": ORANGE}),
            (train.TRIGRU, "TriGRU", looks[train.TRIGRU]),
        ):
            curve = train.distances(rows, name)
            distances.plot(_ends(rows, curve), curve, label=label, **look)
            top = max([top, *filter(math.isfinite, curve)])
        distances.stairs(
            allowed, spans, baseline=None, color=GREY, linestyle=":", linewidth=3, label="allowed"
        )
        distances.set(
            title="Distance of the training loss from nn.GRU's", ylabel="bits per character",
            xlabel="training step", ylim=(-0.05 * top, 2.1 * top), xlim=losses.get_xlim(),
        )  # fmt: skip
        distances.legend(frameon=False, fontsize=15, loc="upper left")

        for y, (name, look) in enumerate(looks.items()):
            p20, p50, p80 = train.throughput(rows, name)
            speeds.barh(y, p50, color=look["color"], height=0.6)
            speeds.errorbar(
                p50, y, xerr=[[p50 - p20], [p80 - p50]], color=GREY, capsize=6, capthick=2
            )
            speeds.text(p80, y, f"  {p50:,.0f}", va="center")
        speeds.set_yticks(range(len(looks)), looks)
        speeds.invert_yaxis()
        speeds.margins(x=0.2)
        speeds.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        speeds.xaxis.set_major_locator(plt.MaxNLocator(4))
        speeds.grid(axis="y", visible=False)
        speeds.set(
            title="Throughput (bar: median, line: p20 to p80)",
            xlabel="characters per second",
        )
        figure.suptitle(
            "A character model trained with nn.GRU and with TriGRU\n"
            f"{first['dtype']}, H = {first['H']:.0f}, B = {first['B']:.0f}, T = {first['T']:.0f}",
            fontsize=20,
        )
        note = (
            f"Training loss is the mean of {train.SMOOTHING} steps. Throughput is that of the "
            "whole training step: embedding, GRU, output layer and optimiser."
        )
        return _save(figure, rows, path, note)


def plot_sweep(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """For each variant and mode, TriGRU's speed-up as one picture and the time per step of all
    providers, in microseconds, as another. Of rows that measure the same, the last one counts."""
    keys = ("device", "variant", "mode", "dtype", "T", "B", "I", "H", "layers", "directions")
    latest = {tuple(r[k] for k in (*keys, "provider")): r for r in rows}
    devices = _unique(r["device"] for r in rows)
    paths = []
    for device, variant, mode in _unique((r["device"], r["variant"], r["mode"]) for r in rows):
        chosen = [r for key, r in latest.items() if key[:3] == (device, variant, mode)]
        parts = [stem, *([_slug(device)] if len(devices) > 1 else []), "{}", variant, mode]
        name = "-".join(parts) + ".png"
        for kind, draw in (("speedup", _speedups), ("time", _times)):
            paths.append(_panels(chosen, folder / name.format(kind), kind, draw))
    return paths


def _panels(rows: Sequence[Row], path: Path, kind: str, draw: Any) -> Path:
    """One panel under the other, for each dtype, length and depth."""
    group = ("dtype", "T", "layers", "directions")
    groups = _unique(tuple(r[k] for k in group) for r in rows)
    other = next((r["provider"] for r in rows if r["provider"] != "trigru"), "")
    variant, mode = rows[0]["variant"], rows[0]["mode"]
    with plt.rc_context(STYLE):
        figure, all_axes = plt.subplots(
            len(groups), 1, figsize=(WIDTH, 3.4 + 5.2 * len(groups)), layout="constrained",
            squeeze=False,
        )  # fmt: skip
        for axes, (dtype, T, layers, directions) in zip(all_axes[:, 0], groups, strict=True):
            panel = [
                r for r in rows if tuple(r[k] for k in group) == (dtype, T, layers, directions)
            ]
            hidden = sorted({r["H"] for r in panel})
            draw(axes, panel, hidden, other)
            more = f", {layers:.0f} layers" * (layers > 1) + ", bidirectional" * (directions > 1)
            axes.set_title(f"{dtype}, T = {T:.0f}{more}")
            axes.set_xticks(range(len(hidden)), [f"{H:.0f}" for H in hidden])
            axes.set_xlim(-0.5, len(hidden) - 0.5)
            axes.set_xlabel("hidden size H = input size")
        question = {
            "speedup": f"Speed of TriGRU relative to {NAMES.get(other, other)}",
            "time": f"Time per step of TriGRU and {NAMES.get(other, other)}",
        }[kind]
        question = textwrap.fill(question, TITLE_LINE)
        figure.suptitle(f"{question}\n{variant} variant, {WHAT[mode]}", fontsize=20)
        note = {
            "speedup": "Marks: ratio of medians. Thin bars: p20 of one over p80 of the other.",
            "time": "Lines: medians. Bands: p20 to p80.",
        }[kind]
        return _save(figure, rows, path, "\n".join([note, *_failures(rows)]))


def _speedups(axes: Axes, rows: Sequence[Row], hidden: list[float], other: str) -> None:
    """Lines of the ratio of the medians over H, one for each B; parity is marked."""
    batches = sorted({r["B"] for r in rows})
    extremes = [0.9, 1.1]
    for i, B in enumerate(batches):
        shift = 0.06 * (i - (len(batches) - 1) / 2)  # so that the bars of two B do not overlap
        points = []
        for x, H in enumerate(hidden):
            of_shape = [r for r in rows if (r["B"], r["H"], r["status"]) == (B, H, "ok")]
            us = next((r for r in of_shape if r["provider"] == "trigru"), None)
            them = next((r for r in of_shape if r["provider"] == other), None)
            if us and them:
                ratio = them["p50_us"] / us["p50_us"]
                low, high = them["p20_us"] / us["p80_us"], them["p80_us"] / us["p20_us"]
                points.append((x + shift, ratio, ratio - low, high - ratio))
                extremes += [low, high]
        if points:
            xs, ratios, down, up = zip(*points, strict=True)
            axes.errorbar(
                xs, ratios, yerr=(down, up), color=COLOURS[i % 7], marker=MARKERS[i % 7],
                elinewidth=1, label=f"B = {B:.0f}",
            )  # fmt: skip
    axes.axhline(1, color=BLACK, linewidth=2)
    low, high = min(extremes), max(extremes)
    room = max(1.3, (high / low) ** 0.15)  # for what is written
    low, high = low / room, high * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    if high / low < 30:
        every = NARROW_TICKS if high / low < 2.5 else WIDE_TICKS
        axes.set_yticks([t for t in every if low <= t <= high])
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("speed-up")
    for y, va, text in ((0.98, "top", "TriGRU faster"), (0.02, "bottom", "TriGRU slower")):
        axes.text(0.99, y, text, transform=axes.transAxes, ha="right", va=va, color=GREY)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=15, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2)
        )


def _times(axes: Axes, rows: Sequence[Row], hidden: list[float], other: str) -> None:
    """Lines of the median time per step over H with a band from p20 to p80: both providers at the
    smallest, the middle and the largest B."""
    batches = sorted({r["B"] for r in rows})
    batches = _unique((batches[0], batches[len(batches) // 2], batches[-1]))
    for i, B in enumerate(batches):
        for provider, line in (("trigru", "-"), (other, "--")):
            points = [
                (x, *(r[p] / r["T"] for p in ("p20_us", "p50_us", "p80_us")))
                for x, H in enumerate(hidden)
                for r in rows
                if (r["provider"], r["B"], r["H"], r["status"]) == (provider, B, H, "ok")
            ]
            if points:
                xs, p20, p50, p80 = zip(*points, strict=True)
                label = f"{NAMES.get(provider, provider)}, B = {B:.0f}"
                axes.plot(
                    xs, p50, line, color=COLOURS[i], marker=MARKERS[i], label=label,
                    markerfacecolor=COLOURS[i] if provider == "trigru" else "white",
                )  # fmt: skip
                axes.fill_between(xs, p20, p80, color=COLOURS[i], alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("µs per time step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=13, ncols=len(batches), columnspacing=1, handlelength=1.6,
            loc="upper center", bbox_to_anchor=(0.45, -0.2),
        )  # fmt: skip


def _failures(rows: Sequence[Row]) -> list[str]:
    """What was not measured, and why, in a few lines."""
    failed = [r for r in rows if r["status"] != "ok"]
    kinds = _unique((r["provider"], r["dtype"], r["status"]) for r in failed)
    said = []
    for kind in kinds[:4]:
        alike = [r for r in failed if (r["provider"], r["dtype"], r["status"]) == kind]
        sizes = ", ".join(
            f"{k} = {', '.join(f'{v:.0f}' for v in sorted({r[k] for r in alike}))}" for k in "BH"
        )
        provider, dtype, status = kind
        said.append(
            f"No time for {NAMES.get(provider, provider)} {dtype}, {sizes} "
            f"({len(alike)} in all): {textwrap.shorten(status, 150)}"
        )
    more = [f"And {len(kinds) - 4} other reasons in the CSV file."] if len(kinds) > 4 else []
    return [*said, *more]


def _save(figure: Figure, rows: Sequence[Row], path: Path, note: str = "") -> Path:
    """Write the picture with the small print under it: where, with what and when."""
    known = {k: ", ".join(_unique(str(r[k]) for r in rows if r[k])) for k in sweep.COLUMNS[:8]}
    says = {
        "device": "{}", "driver": "driver {}", "torch": "torch {}", "triton": "Triton {}",
        "cudnn": "cuDNN {}", "commit": "commit {}", "kernel_hash": "kernels {}",
    }  # fmt: skip
    facts = [text.format(known[k]) for k, text in says.items() if known[k]]
    facts.append(max(r["date"] for r in rows))
    lines = textwrap.wrap(" · ".join(facts), LINE)
    if known["device"].startswith("CPU"):
        lines += textwrap.wrap(
            "On a CPU none of TriGRU's kernels run: its torch variant goes through PyTorch's own "
            "GRU, its textbook variant through a plain loop.", LINE,
        )  # fmt: skip
    lines = [part for said in note.splitlines() for part in textwrap.wrap(said, LINE)] + lines
    figure.supxlabel("\n".join(lines), fontsize=13, color="#444444", x=0.02, ha="left")
    figure.savefig(path)
    plt.close(figure)
    return path


def _ends(run: Sequence[Row], curve: Sequence[float]) -> list[float]:
    """The steps at which the means of a smoothed curve end."""
    steps = sorted({r["step"] for r in run})
    return steps[len(steps) - len(curve) :]


def _number(text: str) -> float | None:
    return float(text) if text else None


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
