"""The pictures of trainings."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from . import episodes, stream, train
from .plot import BLACK, GREY, ORANGE, RED, SKY, STYLE, WIDTH, Row, save


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

        _bars(speeds, {name: train.throughput(rows, name) for name in looks}, looks)
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
        return save(figure, rows, path, note)


def plot_episodes(rows: Sequence[Row], path: Path) -> Path:
    """Answers, errors of the updates and speed of the three runs of one training on episodes, as
    one picture."""
    looks: dict[str, dict[str, Any]] = {
        episodes.LOOP: {"color": ORANGE, "linewidth": 10},
        episodes.PADDED: {"color": SKY, "linewidth": 6},
        episodes.TRIGRU: {"color": BLACK, "linestyle": "--", "linewidth": 2},
    }
    first = rows[0]
    with plt.rc_context(STYLE):
        figure, (answers, errors, updates, speeds) = plt.subplots(
            4, 1, figsize=(WIDTH, 17.5), height_ratios=(5, 3, 2.2, 2.2), layout="constrained"
        )
        width = min(train.SMOOTHING, max(int(r["step"]) for r in rows))
        for name, look in looks.items():
            run = [r for r in rows if r["run"] == name]
            windows = [run[i : i + width] for i in range(len(run) - width + 1)]
            curve = [100 * episodes.share(window) for window in windows]
            answers.plot(_ends(run, curve), curve, label=name, **look)
        answers.axhline(100 * episodes.CHANCE, color=GREY, linestyle=":", linewidth=3)
        at = dict(xy=(1, 100 * episodes.CHANCE), xycoords=("axes fraction", "data"))
        answers.annotate(
            "chance", **at, xytext=(0, -8), textcoords="offset points", ha="right", va="top"
        )
        answers.set(
            title="Questions answered right, which is the return", ylabel="%", ylim=(0, 104),
            xlabel="update",
        )  # fmt: skip
        answers.legend(frameon=False, loc="center right")

        judged = [r for r in rows if r["error"] is not None]
        for size, (name, look) in zip((15, 10, 5), looks.items(), strict=True):
            run = [r for r in judged if r["run"] == name]
            errors.plot(
                [r["step"] for r in run], [r["error"] for r in run], "o", color=look["color"],
                markersize=size, label=name,
            )  # fmt: skip
        run = [r for r in judged if r["run"] == episodes.LOOP]
        errors.plot(
            [r["step"] for r in run], [r["allowed_error"] for r in run], color=GREY,
            linestyle=":", linewidth=3, label="allowed",
        )  # fmt: skip
        errors.set(
            title="An update's distance from float64's", ylabel="relative error", yscale="log",
            xlabel="update", xlim=answers.get_xlim(), ylim=_decades(r["error"] for r in judged),
        )  # fmt: skip
        errors.legend(handles=errors.lines[-1:], frameon=False, loc="upper left")

        for axes, column, title in (
            (updates, "update_steps_per_s", "Updates alone (bar: median, line: p20 to p80)"),
            (speeds, "steps_per_s", "Updates and acting, step by step"),
        ):
            speed = {name: train.throughput(rows, name, column) for name in reversed(looks)}
            _bars(axes, speed, looks)
            axes.set(title=title, xlabel="steps of the environment per second")
        figure.suptitle(
            "An actor-critic trained on episodes that end at any step\n"
            f"{first['dtype']}, H = {first['H']:.0f}, B = {first['B']:.0f}, T = {first['T']:.0f}",
            fontsize=20,
        )
        note = (
            f"Answers are those of {width} updates. The first symbol of an episode has to be "
            "recalled at its end, and nothing but the reset says which that was. Errors are the "
            "largest of outputs, state and gradients, for all three from one rollout and the same "
            "weights. With resets TriGRU is a plain loop on a CPU, in either variant."
        )
        return save(figure, rows, path, note)


def plot_stream(rows: Sequence[Row], path: Path) -> Path:
    """Errors of the forecasts in training, their distance from float64's by the size of the chunks,
    and their errors on days that were held out, of one training, as one picture."""
    looks: dict[str, dict[str, Any]] = {
        train.YARDSTICK: {"color": SKY, "linewidth": 7},
        train.TRIGRU: {"color": BLACK, "linestyle": "--", "linewidth": 2},
    }
    first = rows[0]
    steps = [r for r in rows if r["chunk"] is None]
    readings = [r for r in rows if r["chunk"] is not None]
    with plt.rc_context(STYLE):
        figure, (losses, errors, held_out) = plt.subplots(
            3, 1, figsize=(WIDTH, 14.5), height_ratios=(5, 3.5, 2.2), layout="constrained"
        )
        for name, look in looks.items():
            run = [r for r in steps if r["run"] == name]
            curve = train.smoothed([r["rms_us"] for r in run])
            losses.plot(_ends(run, curve), curve, label=name, **look)
        curve = train.smoothed([r["naive_us"] for r in run])
        losses.plot(
            _ends(run, curve), curve, color=GREY, linestyle=":", linewidth=3,
            label="tomorrow is as today",
        )  # fmt: skip
        losses.set(
            title="Error of the forecasts in training", ylabel="µs, root mean square",
            xlabel="training step", ylim=(0, None),
        )  # fmt: skip
        losses.legend(frameon=False, loc="center right")

        chunks = sorted({r["chunk"] for r in readings})
        for size, (name, look) in zip((15, 7), looks.items(), strict=True):
            run = sorted((r for r in readings if r["run"] == name), key=lambda r: r["chunk"])
            errors.plot(
                range(len(chunks)), [r["error"] for r in run], "o", color=look["color"],
                markersize=size, label=name,
            )  # fmt: skip
        errors.plot(
            range(len(chunks)), [r["allowed_error"] for r in run], color=GREY, linestyle=":",
            linewidth=3, label="allowed for TriGRU",
        )  # fmt: skip
        errors.set_xticks(range(len(chunks)), [f"{chunk:,.0f}" for chunk in chunks])
        errors.set(
            title="Distance from float64's forecasts of all days at once", yscale="log",
            ylabel="relative error", xlabel="days read at a time, the state carried along",
            ylim=_decades(r["error"] for r in readings), xlim=(-0.5, len(chunks) - 0.5),
        )  # fmt: skip
        errors.legend(handles=errors.lines[-1:], frameon=False, loc="upper left")

        bars = {name: (stream.rms(rows, name),) * 3 for name in looks}
        bars |= {"as today": (readings[-1]["naive_us"],) * 3}
        _bars(held_out, bars, looks | {"as today": {"color": GREY}}, ".1f")
        held_out.set(title="Error on days that were held out", xlabel="µs, root mean square")
        figure.suptitle(
            "Forecasts of the length of the day\n"
            f"{first['dtype']}, H = {first['H']:.0f}, B = {first['B']:.0f}, T = {first['T']:.0f}",
            fontsize=20,
        )
        note = (
            f"Length of the day, 1962 to 2024: IERS EOP C04, as astropy-iers-data ships it. In "
            f"training, errors are the mean of {train.SMOOTHING} steps. Held out are the last "
            f"{stream.HELD_OUT:.0%} of the days."
        )
        return save(figure, rows, path, note)


def _decades(values: Iterable[float]) -> tuple[float, float]:
    """Powers of ten with all values between them and some room, most of it above."""
    logs = [math.log10(v) for v in values if 0 < v < math.inf] or [0.0]
    return 10.0 ** math.floor(min(logs) - 0.1), 10.0 ** (math.ceil(max(logs)) + 1)


def _bars(
    axes: Axes,
    values: dict[str, tuple[float, float, float]],
    looks: dict[str, dict[str, Any]],
    form: str = ",.0f",
) -> None:
    """A bar for each name: p50, and a line from p20 to p80 where they differ."""
    for y, (name, (p20, p50, p80)) in enumerate(values.items()):
        axes.barh(y, p50, color=looks[name]["color"], height=0.6)
        if p20 < p80:
            around = [[p50 - p20], [p80 - p50]]
            axes.errorbar(p50, y, xerr=around, color=GREY, capsize=6, capthick=2)
        axes.text(p80, y, f"  {p50:{form}}", va="center")
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes.grid(axis="y", visible=False)


def _ends(run: Sequence[Row], curve: Sequence[float]) -> list[float]:
    """The steps at which the means of a smoothed curve end."""
    steps = sorted({r["step"] for r in run})
    return steps[len(steps) - len(curve) :]
