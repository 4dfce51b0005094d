"""`python -m perf plot`: pictures from CSV files, nothing else. What all pictures share is here."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from . import accuracy, episodes, stream, sweep, train
from .measure import FACTS
from .rows import Row, read_csv, unique

# Okabe and Ito's palette, which the colour-blind can tell apart; yellow is too pale for lines.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#000000"
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
LINE = 90  # characters of small print that fit into WIDTH


def plot_csv(path: Path, folder: Path | None = None) -> list[Path]:
    """Draw the pictures of a CSV file, beside it or in `folder`; the files written.

    Raises ValueError if the file is none of a training, a sweep or an accuracy measurement."""
    from . import plot_sweep, plot_train  # which take from here what pictures share

    columns, rows = read_csv(path)
    folder = folder or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    trainings = {
        train.COLUMNS: plot_train.plot_training,
        episodes.COLUMNS: plot_train.plot_episodes,
        stream.COLUMNS: plot_train.plot_stream,
    }
    if columns in trainings:
        last = [r for r in rows if r["date"] == rows[-1]["date"]]
        return [trainings[columns](last, folder / f"{path.stem}.png")]
    if columns == sweep.COLUMNS:
        return plot_sweep.plot_sweep(rows, folder, path.stem)
    if columns == accuracy.COLUMNS:
        return plot_sweep.plot_accuracy(rows, folder, path.stem)
    raise ValueError(f"{path} is no training, sweep or accuracy: its columns are {columns}")


def plot_all(results: Path, readme: Path) -> list[Path]:
    """Draw the pictures of every GPU's folder in `results`, each beside its data, and bring
    README's account of them up to date; the pictures written."""
    from .readme import update

    names = ("sweep.csv", "accuracy.csv", "train.csv", "episodes.csv", "stream.csv")
    found = sorted(path for name in names for path in results.glob(f"*/{name}"))
    pictures = [picture for path in found for picture in plot_csv(path)]
    update(readme, results)
    return pictures


def save(figure: Figure, rows: Sequence[Row], path: Path, note: str = "") -> Path:
    """Write the picture with the small print under it: where, with what and when."""
    known = {k: ", ".join(unique(str(r[k]) for r in rows if r[k])) for k in FACTS}
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
