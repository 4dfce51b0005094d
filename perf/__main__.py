"""The command line: `python -m perf [train | sweep | evidence | plot | compare | static | …]`."""

import argparse
import math
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched

from . import episodes, stream
from . import train as text
from .compare import compare, report
from .evidence import FAILED, LOST, PARTS, ROOT, WRONG, run_evidence, run_part
from .plot import plot_all, plot_csv
from .providers import DTYPES
from .shapes import SETS, VARIANTS
from .sweep import DeviceLost, make_bench, run_sweep

TASKS = {"text": text, "episodes": episodes, "stream": stream}
SECONDS = {"cpu": 0.3, "cuda": 0.1}  # to time each shape and mode of a sweep, about
DEFAULT_SECONDS = 210.0  # after which a sweep of the default set ends, so that all takes 5 minutes


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or WRONG if TriGRU was found wrong, or became so between two sweeps, LOST
    if a kernel ended this process's use of the device, FAILED if anything else was raised."""
    args = parser().parse_args(argv)
    if (args.command, args.task) != ("train", "text") and is_torchelastic_launched():
        raise SystemExit("only train is for torchrun, with the task text: python -m perf train")
    if args.command == "plot":
        for path in args.csv:
            tell(plot_csv(path, args.out))
        if not args.csv:
            tell(plot_all(ROOT / "perf" / "results", ROOT / "README.md"))
        return 0
    if args.command == "compare":
        comparison = compare(args.before, args.after)
        print(report(comparison))
        return 0 if comparison.good else 1
    if args.command == "static":
        from .static import write_static  # which needs Triton

        write_static(args.out or ROOT / "perf" / "static.csv")
        return 0
    if args.command == "regret":
        from .regret import write_regret  # likewise

        print(write_regret(args.out or ROOT / "perf" / "regret.csv"))
        return 0
    device = torch.device(args.device)
    if device.type == "cpu":
        # With problems this small, threads gain little, and they lose a hundredfold where they
        # wait for each other while another process has the cores.
        torch.set_num_threads(1)
    folder = args.out or Path("perf-results")
    try:
        if args.command == "evidence":
            good = evidence(device, args, folder)
        else:
            good = True
            if args.command in (None, "train"):
                name = "train" if args.task == "text" else args.task
                good &= train(device, args, folder / f"{name}.csv")
            if args.command in (None, "sweep"):
                good &= sweep(device, args, folder / "sweep.csv")
    except DeviceLost as error:
        print(error, file=sys.stderr)
        return LOST
    except Exception:
        traceback.print_exc()
        return FAILED
    return 0 if good else WRONG


def evidence(device: torch.device, args: argparse.Namespace, folder: Path) -> bool:
    """Run all parts of the evidence, or one; whether all was right."""
    folder.mkdir(parents=True, exist_ok=True)
    if args.only is None:
        # Parts are sessions of their own: end them with this one, not only where it ends by itself.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return run_evidence(device, folder, args.minutes)
    return run_part(args.only, device, folder, args.minutes)


def train(device: torch.device, args: argparse.Namespace, path: Path) -> bool:
    """Train, draw, and say whether TriGRU agrees with nn.GRU; whether it does."""
    task: Any = TASKS[args.task]
    settings = task.SETTINGS[device.type]
    settings = settings._replace(steps=args.steps or settings.steps, H=args.hidden or settings.H)
    good, sentence = task.verdict(task.run_training(device, args.train_dtype, settings, path))
    tell(plot_csv(path))
    print(sentence)
    return good


def sweep(device: torch.device, args: argparse.Namespace, path: Path) -> bool:
    """Measure the chosen shapes and draw; whether all of TriGRU's results were right."""
    on_cuda = device.type == "cuda"
    name = args.set or ("default" if on_cuda else "smoke")
    chosen = [c for c in SETS[name]() if c.dtype in args.dtype and c.variant in args.variant]
    if not chosen:
        raise SystemExit(f"the set {name!r} has no such shapes")
    if on_cuda and find_spec("triton"):  # which not every machine has
        from .ahead import compile_ahead

        compile_ahead(chosen, device)
    bench = make_bench(device, args.seconds or SECONDS[device.type], path.with_name("floors.csv"))
    end = time.monotonic() + (DEFAULT_SECONDS if name == "default" else math.inf)
    good = run_sweep(chosen, path, bench, until=lambda: time.monotonic() > end)
    tell(plot_csv(path))
    print(
        f"{len(chosen)} shapes of the set {name!r}: TriGRU was "
        + ("right in all that were measured." if good else "NOT ok in some: see the status column.")
    )
    return good


def tell(pictures: Iterable[Path]) -> None:
    """Say what was drawn."""
    for picture in pictures:
        print(f"wrote {picture}")


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands. The defaults are set once, on top, for no command too."""

    def add_out(to: argparse.ArgumentParser, metavar: str, text: str) -> None:
        to.add_argument("--out", type=Path, metavar=metavar, help=text)

    def add_device(to: argparse.ArgumentParser) -> None:
        to.add_argument("--device", choices=sorted(SECONDS), help="default: cuda if there is one")

    top = argparse.ArgumentParser(
        "python -m perf",
        description="Train and time TriGRU against PyTorch's own GRU. Without a command: train, "
        "then sweep, both with their defaults, writing to perf-results.",
    )
    add_out(top, "DIR", "where to write")
    add_device(top)
    top.set_defaults(
        out=None, device="cuda" if torch.cuda.is_available() else "cpu", task="text",
        steps=None, hidden=None, train_dtype="fp32", set=None, dtype=list(DTYPES),
        variant=list(VARIANTS), seconds=None, only=None, minutes=9.5, csv=[],
    )  # fmt: skip
    commands = top.add_subparsers(dest="command")

    def command(
        name: str, text: str, out: tuple[str, str] = ("DIR", "where to write")
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        add_out(sub, *out)
        return sub

    sub = command("train", "the same model with nn.GRU and with TriGRU, side by side")
    add_device(sub)
    sub.add_argument(
        "--task", choices=TASKS, help="what to learn: text, by characters (default); episodes that "
        "end at any step, with resets; a long stream of measurements, in chunks",
    )  # fmt: skip
    sub.add_argument("--dtype", dest="train_dtype", choices=DTYPES, help="default: fp32")
    sub.add_argument("--steps", type=int, help="training steps")
    sub.add_argument("--hidden", type=int, metavar="H", help="hidden units")

    sub = command("sweep", "speed, memory and error over a set of shapes")
    add_device(sub)
    sub.add_argument("--set", choices=SETS, help="default: default on a GPU, smoke on a CPU")
    sub.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these")
    sub.add_argument("--variant", nargs="+", choices=VARIANTS, help="only these")
    sub.add_argument(
        "--seconds", type=float, help="to time each shape and mode, about; 0.1 on a GPU, 0.3"
    )

    sub = command("evidence", "check and measure a GPU within ten minutes: tests, floors, sweep")
    add_device(sub)
    sub.add_argument("--only", choices=PARTS, help="this part alone, in this process")
    sub.add_argument("--minutes", type=float, help="for all, or for a sweep alone, about; 9.5")

    sub = command("plot", "draw CSV files again, beside them or in DIR")
    sub.add_argument(
        "csv", nargs="*", type=Path, metavar="CSV", help="default: all of perf/results"
    )

    sub = command("compare", "what got faster or slower between two sweeps")
    sub.add_argument("before", type=Path, metavar="A.csv")
    sub.add_argument("after", type=Path, metavar="B.csv")

    out = ("CSV", "default: perf/static.csv")
    command("static", "a model's clocks of compiled kernels, for GPUs that are not here", out)
    out = ("CSV", "default: perf/regret.csv; what is estimated is kept in clocks.csv beside it")
    command("regret", "how far the plans that are chosen lie behind the best, by a model", out)
    return top


if __name__ == "__main__":
    sys.exit(main())
