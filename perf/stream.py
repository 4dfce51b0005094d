"""`python -m perf train --task stream`: forecasts of one long series, fed whole and fed in chunks.

The series is the length of the day. The Earth turns in a little more or less than 86,400 s, as
tides and winds have it; it has been measured every day since 1962. nn.GRU and TriGRU learn from
chunks of it, carrying the state along, to tell tomorrow's length; the forecast to beat says that it
is today's. Then they read it from its first day to its last, in chunks of every size: as long as
h_n is carried along, all sizes must give the same forecasts."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trigru import TriGRU
from trigru.accuracy import allowed_error, relative_error

from .measure import FACTS, append_row, facts, now
from .progress import tqdm
from .providers import DTYPES, flatten
from .train import SEED, TRIGRU, YARDSTICK, Optimiser, Row, Settings, time_on

COLUMNS = (
    *FACTS, "run", "dtype", "T", "B", "H", "step", "chunk", "rms_us", "naive_us", "error",
    "allowed_error", "steps_per_s",
)  # fmt: skip

# T is that of the chunks in training, of which B, from different years, are side by side.
SETTINGS = {"cpu": Settings(300, T=64, B=16, H=32), "cuda": Settings(600, T=128, B=16, H=256)}

FIRST_DAY, LAST_DAY = 37665, 60675  # 1962-01-01 and 2024-12-31, as modified Julian dates
HELD_OUT = 0.2  # of the days, the last ones
CHUNKS = (1, 30, 365)  # days, besides the whole series
INPUTS = 2
LEARNING_RATE = 5e-3

# How far apart the errors of TriGRU's and nn.GRU's forecasts may be, in parts of nn.GRU's. Measured
# with the CPU's settings after 30 to 600 steps: weights nudged by 2^-10 gave 0.0002 and less, by
# 2^-7 0.0018 and less; no gradient for U 0.11, the gradient cut every 16 steps 0.008.
CLOSE = 0.005


def day_lengths() -> Tensor:
    """By how many microseconds each day from FIRST_DAY to LAST_DAY was longer than 86,400 s, in
    float64: the series EOP C04 of the International Earth Rotation and Reference Systems Service.

    Raises ModuleNotFoundError without the package that ships it, ValueError if it lacks days."""
    try:
        from astropy_iers_data import IERS_B_FILE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the task stream reads a series that the package astropy-iers-data ships: "
            "pip install astropy-iers-data, or pip install -e '.[stream]'"
        ) from error
    lengths = {}
    for line in Path(IERS_B_FILE).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            cells = line.split()
            lengths[round(float(cells[4]))] = float(cells[12])
    days = range(FIRST_DAY, LAST_DAY + 1)
    if missing := [day for day in days if day not in lengths]:
        raise ValueError(f"{IERS_B_FILE} lacks {len(missing)} of {len(days)} days")
    return 1e6 * torch.tensor([lengths[day] for day in days], dtype=torch.float64)


def prepared(lengths: Tensor, learnt: int) -> tuple[Tensor, Tensor, float]:
    """Of lengths (days,): what a model reads each day, the length and how much it has changed since
    the day before, (days − 2, INPUTS); by how much it will change until the next day, (days − 2,);
    and the unit of changes in µs. Both are in standard deviations over the first `learnt` days."""
    changes = lengths.diff()
    unit = changes[: learnt - 1].std().item()
    level = (lengths - lengths[:learnt].mean()) / lengths[:learnt].std()
    changes = changes / unit
    return torch.stack((level[1:-1], changes[:-1]), 1), changes[1:], unit


class Forecaster(nn.Module):
    """What a day shows, and what the days before it have shown, to tomorrow's change."""

    def __init__(self, gru: nn.Module, H: int) -> None:
        super().__init__()
        self.gru = gru
        torch.manual_seed(SEED)
        self.head = nn.Linear(H, 1)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (T, B, INPUTS), h (1, B, H) → changes (T, B) and the state after them."""
        y, h = self.gru(x, h)
        return self.head(y).squeeze(-1), h


def make_layers(H: int) -> dict[str, nn.Module]:
    """The recurrent layers by run, with the same weights."""
    torch.manual_seed(SEED)
    yardstick, trigru = nn.GRU(INPUTS, H), TriGRU(INPUTS, H)
    trigru.load_state_dict(yardstick.state_dict())
    return {YARDSTICK: yardstick, TRIGRU: trigru}


class Run:
    """A model in training: its optimiser and the state it carries along."""

    def __init__(self, gru: nn.Module, H: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model = Forecaster(gru, H).to(device=device)
        self.optimiser = Optimiser(self.model, LEARNING_RATE)
        self.model.to(dtype=dtype)
        if isinstance(gru, nn.GRU):
            flatten(gru)
        self.h: Tensor | None = None

    def step(self, x: Tensor, targets: Tensor) -> Tensor:
        """Train on x (T, B, INPUTS), days that follow those of the last call, and the changes after
        them (T, B); the mean square of the errors."""
        changes, h = self.model(x, self.h)
        self.h = h.detach()
        loss = (changes.float() - targets).square().sum()
        self.model.zero_grad()
        loss.backward()
        self.optimiser.step(targets.numel())
        return loss.detach() / targets.numel()


@torch.no_grad()
def read(model: Forecaster, x: Tensor, chunk: int) -> Tensor:
    """The changes (days,) that a model forecasts of x (days, INPUTS), read `chunk` days at a time,
    the state carried from one to the next."""
    h, changes = None, []
    for part in x.to(next(model.parameters()).dtype)[:, None].split(chunk):
        forecast, h = model(part, h)
        changes.append(forecast[:, 0])
    return torch.cat(changes)


def like(model: Forecaster, H: int, dtype: torch.dtype) -> Forecaster:
    """The same model with an nn.GRU, in a dtype."""
    gru = nn.GRU(INPUTS, H)
    twin = Forecaster(gru, H)
    twin.load_state_dict(model.state_dict())
    twin.to(device=model.head.weight.device, dtype=dtype)
    flatten(gru)
    return twin


def run_training(
    device: torch.device,
    dtype: str,
    settings: Settings,
    path: Path,
    *,
    lengths: Tensor | None = None,
    clock: Callable[[], float] = time.perf_counter,
    layers: Callable[[int], dict[str, nn.Module]] = make_layers,
) -> list[Row]:
    """Train all runs in turn on the same chunks, then let them read the series in chunks of every
    size, and append a row for each step and for each size of each run to the CSV file at `path`.
    `clock` tells the time in seconds. The rows."""
    steps, T, B, H = settings
    lengths = (day_lengths() if lengths is None else lengths).to(device)
    learnt = int(len(lengths) * (1 - HELD_OUT))
    x, targets, unit = prepared(lengths, learnt)
    element = DTYPES[dtype]
    runs = {name: Run(layer, H, device, element) for name, layer in layers(H).items()}
    known = facts(device) | {"date": now(), "dtype": dtype, "T": T, "B": B, "H": H}
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(known | row)
        append_row(path, COLUMNS, rows[-1])

    # The years that are learnt from, in B pieces side by side: (days of a piece, B, …)
    length = learnt // B
    pieces, wanted = (
        each[: length * B].unflatten(0, (B, length)).transpose(0, 1).contiguous()
        for each in (x.to(element), targets.float())
    )
    bar = tqdm(range(steps), unit="step", desc="train")
    for step in bar:
        at = step % (length // T) * T
        losses = {}
        for name, run in runs.items():
            if at == 0:
                run.h = None
            start = time_on(device, clock)
            loss = run.step(pieces[at : at + T], wanted[at : at + T])
            seconds = time_on(device, clock) - start
            naive = unit * wanted[at : at + T].square().mean().sqrt().item()
            losses[name] = unit * math.sqrt(loss.item())
            add({
                "run": name, "step": step + 1, "chunk": None, "rms_us": losses[name],
                "naive_us": naive, "error": None, "allowed_error": None,
                "steps_per_s": round(T * B / seconds),
            })  # fmt: skip
        bar.set_postfix_str(f"µs: {', '.join(f'{n} {loss:.0f}' for n, loss in losses.items())}")

    sizes = [*CHUNKS, len(x)]
    with tqdm(total=len(runs) * len(sizes), unit="size", desc="read") as bar:
        for name, run in runs.items():
            exact = read(like(run.model, H, torch.float64), x, len(x))
            twin = like(run.model, H, element)
            for chunk in sizes:
                start = time_on(device, clock)
                changes = read(run.model, x, chunk)
                seconds = time_on(device, clock) - start
                yardstick = changes if name == YARDSTICK else read(twin, x, chunk)
                wrong = (unit * (changes - targets))[learnt:]
                add({
                    "run": name, "step": steps, "chunk": chunk,
                    "rms_us": wrong.square().mean().sqrt().item(),
                    "naive_us": unit * targets[learnt:].square().mean().sqrt().item(),
                    "error": relative_error(changes, exact),
                    "allowed_error": allowed_error(yardstick, exact),
                    "steps_per_s": round(len(x) / seconds),
                })  # fmt: skip
                bar.update()
    return rows


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether TriGRU's forecasts are the same from chunks of every size, as good as nn.GRU's and
    better than the naive ones, and sentences that say within what."""
    readings = [r for r in rows if r["run"] == TRIGRU and r["chunk"] is not None]
    same = all(r["error"] <= r["allowed_error"] < math.inf for r in readings)
    worst = max(readings, key=lambda r: r["error"] / r["allowed_error"])
    sizes = ", ".join(f"{r['chunk']:.0f}" for r in readings)
    ours, theirs, naive = rms(rows, TRIGRU), rms(rows, YARDSTICK), readings[-1]["naive_us"]
    agrees = abs(ours / theirs - 1) <= CLOSE
    return same and agrees and max(ours, theirs) < naive, (
        f"Read {sizes} days at a time, TriGRU's forecasts {'agree' if same else 'DISAGREE'} with "
        f"nn.GRU's in float64 of all days at once: a relative error of {worst['error']:.1e} at "
        f"worst ({worst['allowed_error']:.1e} is allowed). Where days were held out they are "
        f"{ours:.1f} µs off, which {'agrees' if agrees else 'DISAGREES'} with nn.GRU's "
        f"{theirs:.1f} µs ({CLOSE:.1%} apart is allowed); to take each day for the next makes "
        f"{naive:.1f} µs."
    )


def rms(rows: Sequence[Row], name: str) -> float:
    """By how many µs the run's forecasts of the days that were held out are off, as a root mean
    square, the series read whole."""
    return next(r["rms_us"] for r in reversed(rows) if r["run"] == name and r["chunk"] is not None)
