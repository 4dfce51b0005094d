"""`python -m perf train`: the same character model with nn.GRU and with TriGRU, side by side.

Under torchrun, N processes train it together, each on its share of every batch."""

import math
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trigru import TriGRU
from trigru.accuracy import TF32_ROUNDING
from trigru.launch import uses_tf32

from .measure import FACTS, append_row, facts, now, percentiles
from .progress import tqdm
from .providers import DTYPES, flatten

COLUMNS = (
    *FACTS, "run", "variant", "dtype", "T", "B", "H", "step", "train_bpc", "heldout_bpc",
    "tokens_per_s",
)  # fmt: skip

Row = dict[str, Any]  # a CSV row by column

YARDSTICK, TRIGRU, TEXTBOOK, CONTROL = "nn.GRU", "TriGRU", "TriGRU textbook", "nn.GRU nudged"

SEED = 0
TEXT_BYTES = 4_000_000  # the most that is read
HELD_OUT = 0.05  # of the text, its end
EMBEDDING = 64
LEARNING_RATE = 2e-3
CLIP_NORM = 1.0
WARM_UP_STEPS = 5  # that the throughput leaves out
EVALUATIONS = 10  # in a whole run
EVALUATED = (16, 512)  # rows and steps of the held-out text
SMOOTHING = 20  # steps

# How far TriGRU's loss may be from nn.GRU's, in bits per character. Two right programs that round
# differently drift apart in training, so the run measures how far: CONTROL is nn.GRU again, from
# weights nudged by one rounding of the products' dtype. That drift is one draw of a random thing,
# hence FACTOR; FLOOR is for where it is next to nothing.
#
# Measured with the CPU's settings, after 300 steps, as the distance from nn.GRU in float32: a nudge
# of 2^-23 gave 0.0000, of 2^-10 0.0004, of 2^-7 0.0019, where computing all in float16 gave 0.0002
# and in bfloat16 0.0014. Errors gave more: the gradient cut every 16 steps 0.012, no gradient for
# b_hh 0.015, b_hn outside of the reset gate 0.025, an h_n one step old 0.026, hx ignored 0.049.
# (What only scales a gradient Adam hides: that is for the tests to find.) After 1000 steps chaos
# has grown the smallest nudge to 0.012 and bfloat16's to 0.030, near the errors' 0.07. So the first
# EARLY steps, which can tell, are judged by themselves, and the whole run by its own drift.
FACTOR = 3.0
FLOOR = 0.002
EARLY = 300


class Settings(NamedTuple):
    """The size of a training run. T, B and H are in steps of time, rows and hidden units."""

    steps: int
    T: int
    B: int
    H: int


SETTINGS = {"cpu": Settings(300, T=64, B=16, H=128), "cuda": Settings(1000, T=256, B=64, H=512)}


class CharModel(nn.Module):
    """Bytes to logits of the next byte: an embedding, a GRU and a linear layer."""

    def __init__(self, gru: nn.Module, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.embedding = nn.Embedding(256, EMBEDDING)
        self.head = nn.Linear(hidden, 256)
        self.gru = gru

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (T, B) bytes, state (1, B, H) → logits (T, B, 256) and the state after them."""
        y, state = self.gru(self.embedding(x), state)
        return self.head(y), state


class Optimiser:
    """Adam on float32 copies of a model's parameters: an update is often too small for a 16-bit
    weight. The model may change its dtype once they are made."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model
        self.weights = [p.detach().float().clone() for p in model.parameters()]
        self.adam = torch.optim.Adam(self.weights, learning_rate)

    @torch.no_grad()
    def step(self, count: int) -> None:
        """Take a step along the gradients of a sum over `count` losses, clipped as their mean's.
        The sum's gradients are large enough for float16; the mean's would underflow."""
        parameters = list(self.model.parameters())
        for weight, parameter in zip(self.weights, parameters, strict=True):
            assert parameter.grad is not None
            weight.grad = parameter.grad.float() / count
        nn.utils.clip_grad_norm_(self.weights, CLIP_NORM)
        self.adam.step()
        for weight, parameter in zip(self.weights, parameters, strict=True):
            parameter.copy_(weight)


class Run:
    """A model in training: its optimiser and the state it carries along."""

    def __init__(self, gru: nn.Module, H: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model = CharModel(gru, H).to(device=device)
        self.optimiser = Optimiser(self.model, LEARNING_RATE)
        self.model.to(dtype=dtype)
        self.state: Tensor | None = None
        if isinstance(gru, nn.GRU):
            flatten(gru)
        self.forward: nn.Module = self.model  # in training
        if dist.is_initialized():
            self.forward = DistributedDataParallel(self.model)

    def step(self, text: Tensor) -> Tensor:
        """Train on text (T + 1, B), bytes that follow those of the last call; the loss in bits per
        character. Of several processes, each has rows of its own, and the loss is that of these."""
        logits, state = self.forward(text[:-1], self.state)
        self.state = state.detach()
        targets = text[1:].flatten()
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        self.model.zero_grad()
        loss.backward()  # DistributedDataParallel takes the mean over the processes here
        self.optimiser.step(len(targets))
        return loss.detach() / len(targets) / math.log(2)

    @torch.no_grad()
    def evaluate(self, text: Tensor) -> float:
        """The loss in bits per character on text (T + 1, B), from the zero state."""
        logits, _ = self.model.eval()(text[:-1], None)
        self.model.train()
        loss = F.cross_entropy(logits.float().flatten(0, 1), text[1:].flatten())
        return loss.item() / math.log(2)


def make_layers(H: int, rounding: float) -> dict[str, nn.Module]:
    """The recurrent layers by run. TriGRU starts from nn.GRU's weights; so does a second nn.GRU,
    whose weights are nudged by `rounding`, relative to each, up or down at random."""
    torch.manual_seed(SEED)
    yardstick, nudged = nn.GRU(EMBEDDING, H), nn.GRU(EMBEDDING, H)
    trigru = TriGRU(EMBEDDING, H)
    for layer in (nudged, trigru):
        layer.load_state_dict(yardstick.state_dict())
    with torch.no_grad():
        for w in nudged.parameters():
            w.mul_(1 + rounding * (2 * torch.randint_like(w, 2) - 1))
    torch.manual_seed(SEED)
    textbook = TriGRU(EMBEDDING, H, variant="textbook")
    return {YARDSTICK: yardstick, TRIGRU: trigru, TEXTBOOK: textbook, CONTROL: nudged}


def rounding_of(dtype: torch.dtype, device: torch.device) -> float:
    """The relative rounding error of the products in this dtype: TF32's for float32 on a GPU."""
    tf32 = dtype == torch.float32 and uses_tf32(device)
    return TF32_ROUNDING if tf32 else torch.finfo(dtype).eps


def standard_library() -> bytes:
    """The source of Python's standard library, one file after another by name: text that every
    machine has, if not the same with every Python. At most TEXT_BYTES."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(file.read_bytes() for file in files)[:TEXT_BYTES]


def streams(text: bytes, rows: int, device: torch.device) -> Tensor:
    """The text (length, rows) in `rows` pieces side by side, as numbers of bytes."""
    length = len(text) // rows
    numbers = torch.frombuffer(bytearray(text[: length * rows]), dtype=torch.uint8)
    return numbers.view(rows, length).t().contiguous().to(device, torch.long)


def join_processes(device: torch.device, rows: int) -> tuple[int, int]:
    """The number of this process and how many there are: 0 and 1, or what torchrun says. Then each
    gets a GPU of its own, where that is the device, and they form a group of torch.distributed.

    Raises ValueError if the rows of a batch, or the GPUs, cannot be shared out."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 0, 1
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rows % processes:
        raise ValueError(f"{processes} processes cannot share a batch of {rows} rows equally")
    if device.type == "cuda":
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(
                f"{here} processes need as many GPUs, here are {gpus}: start fewer, or take "
                "--device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, processes


def run_training(
    device: torch.device,
    dtype: str,
    settings: Settings,
    path: Path,
    *,
    text: bytes | None = None,
    clock: Callable[[], float] = time.perf_counter,
    layers: Callable[[int, float], dict[str, nn.Module]] = make_layers,
) -> list[Row]:
    """Train all runs step by step in turn on the same batches, and append a row for each step of
    each run to the CSV file at `path`. `clock` tells the time in seconds. The rows.

    Under torchrun the processes share each batch. The first writes and returns; the others, whose
    work is done, exit.

    Raises ValueError if they cannot share it."""
    steps, T, B, H = settings
    rank, processes = join_processes(device, B)
    first, share = rank == 0, B // processes
    text = standard_library() if text is None else text
    split = int(len(text) * (1 - HELD_OUT))
    training = streams(text[:split], B, device)[:, rank * share : (rank + 1) * share]
    held_out = streams(text[split:], EVALUATED[0], device)[: EVALUATED[1] + 1]
    per_epoch = (len(training) - 1) // T

    element = DTYPES[dtype]
    runs = {
        name: Run(layer, H, device, element)
        for name, layer in layers(H, rounding_of(element, device)).items()
    }
    shape = {"dtype": dtype, "T": T, "B": B, "H": H}
    known = facts(device) | {"date": now()}
    if processes > 1:
        known["device"] += f", {processes} processes"
    rows: list[Row] = []
    bar = tqdm(range(steps), unit="step", desc="train", disable=not first)
    for step in bar:
        at = step % per_epoch * T
        losses = {}
        for name, run in runs.items():
            if at == 0:
                run.state = None
            start = time_on(device, clock)
            loss = run.step(training[at : at + T + 1])
            seconds = time_on(device, clock) - start
            if dist.is_initialized():
                dist.all_reduce(loss)
                loss /= processes
            evaluated = (step + 1) % max(1, steps // EVALUATIONS) == 0
            row = {
                "run": name,
                "variant": getattr(run.model.gru, "variant", "torch"),
                "step": step + 1,
                "train_bpc": loss.item(),
                "heldout_bpc": run.evaluate(held_out) if evaluated else None,
                "tokens_per_s": round(T * B / seconds),
            }
            rows.append(known | shape | row)
            if first:
                append_row(path, COLUMNS, rows[-1])
            losses[name] = row["train_bpc"]
        bar.set_postfix_str(
            f"bits/char: {YARDSTICK} {losses[YARDSTICK]:.2f}, {TRIGRU} {losses[TRIGRU]:.2f}", False
        )
    if dist.is_initialized():
        dist.destroy_process_group()
    if not first:
        # At the interpreter's regular end, a thread of gloo's that is still freeing the tensor of
        # the last collective aborts the process, and torchrun then ends the first one too.
        os._exit(0)
    return rows


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether TriGRU's curves agree with nn.GRU's, and a sentence that says within what."""
    steps = max(r["step"] for r in rows)
    agrees, parts = True, []
    for last in sorted({min(EARLY, steps), steps}):
        distance, allowed = distance_between(rows, TRIGRU, last), allowed_distance(rows, last)
        agrees = agrees and distance <= allowed  # false for nan
        parts.append(f"{distance:.4f} apart over {last:.0f} steps ({allowed:.4f} is allowed)")
    return agrees, (
        f"TriGRU's loss {'agrees' if agrees else 'DISAGREES'} with nn.GRU's: in bits per character "
        f"they are at most {' and '.join(parts)}, in training loss as the mean of {SMOOTHING} "
        "steps and in held-out loss."
    )


def allowed_distance(rows: Sequence[Row], last: float) -> float:
    """How far TriGRU's curves may be from nn.GRU's up to the step `last`, in bits per character."""
    return max(FLOOR, FACTOR * distance_between(rows, CONTROL, last))


def distance_between(rows: Sequence[Row], name: str, last: float) -> float:
    """The largest distance of the run's curves, smoothed training loss and held-out loss, from
    nn.GRU's up to the step `last`, in bits per character; nan if a loss is not finite."""
    until = [r for r in rows if r["step"] <= last]
    every = [*distances(until, name), *distances(until, name, "heldout_bpc")]
    return max(every) if all(map(math.isfinite, every)) else math.nan


def distances(rows: Sequence[Row], name: str, column: str = "train_bpc") -> list[float]:
    """|the run's loss − nn.GRU's| in bits per character: of the training loss after smoothing, or
    of the held-out loss wherever it was evaluated."""
    run, yardstick = (
        [r[column] for r in rows if r["run"] == run and r[column] is not None]
        for run in (name, YARDSTICK)
    )
    if column == "train_bpc":
        run, yardstick = smoothed(run), smoothed(yardstick)
    return [abs(a - b) for a, b in zip(run, yardstick, strict=True)]


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over each value and those before it, SMOOTHING values in all, in their unit; the
    first mean is that of the first SMOOTHING values."""
    width = min(SMOOTHING, len(values))
    return [statistics.fmean(values[i : i + width]) for i in range(len(values) - width + 1)]


def throughput(
    rows: Sequence[Row], name: str, column: str = "tokens_per_s"
) -> tuple[float, float, float]:
    """The run's characters per second, or what else the column has: p20, p50 and p80 over the steps
    after the warm-up."""
    every = [r[column] for r in rows if r["run"] == name]
    return percentiles(every[min(WARM_UP_STEPS, len(every) - 2) :])


def time_on(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The time in seconds when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
