"""The picture of a training."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from . import train
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
        return save(figure, rows, path, note)


def _ends(run: Sequence[Row], curve: Sequence[float]) -> list[float]:
    """The steps at which the means of a smoothed curve end."""
    steps = sorted({r["step"] for r in run})
    return steps[len(steps) - len(curve) :]
