"""`python -m perf evidence`: on a machine with a GPU, check the kernels, measure them, keep it all.

Every part is a process of its own with a limit on its time, so that one that fails or hangs costs
the others nothing, and writes its rows as soon as it has them. It installs nothing and needs no
network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from .accuracy import run_accuracy
from .kernels import run_kernels
from .shapes import SETS, long_and_short, profiled
from .sweep import make_bench, not_measured, run_sweep

PARTS = ("compile", "tests", "floors", "sweep", "kernels", "accuracy")
GPU_PARTS = ("compile", "floors")
# What a part may take in seconds. The sweep has what the others leave of the whole time.
LIMITS = {"compile": 120, "tests": 180, "floors": 75, "kernels": 45, "accuracy": 75}
AFTER_SWEEP = LIMITS["kernels"] + LIMITS["accuracy"]
GRACE = 30  # seconds beyond its time that a sweep has to start in, and for its last shape
SWEEP_SECONDS = 0.05  # to time a shape and mode

ROOT = Path(__file__).parents[1]
Run = Callable[[list[str], float], int]  # a command and its limit in seconds → its exit code


def run_part(part: str, device: torch.device, folder: Path, minutes: float) -> bool:
    """Run one part in this process and write its file into `folder`; whether all was right.

    The sweep goes on where the file ends, and stops after about so many minutes. Raises
    DeviceLost where it ends for another reason."""
    on_cuda = device.type == "cuda"
    cases = list(SETS["core" if on_cuda else "smoke"]())
    accuracy, kernels = list(long_and_short(on_cuda)), list(profiled()) if on_cuda else cases[:1]
    if part == "compile":
        from .ahead import compile_ahead  # it needs Triton, which not every machine has

        compile_ahead([*cases, *accuracy, *kernels], device, floors=True)
        return True
    if part == "tests":
        return run_tests(folder / "tests.txt")
    if part == "floors":
        from .floor_kernels import run_floors

        run_floors(cases, device, folder / "floors.csv")
        return True
    if part == "sweep":
        path, end = folder / "sweep.csv", time.monotonic() + 60 * minutes
        bench = make_bench(device, SWEEP_SECONDS, folder / "floors.csv")
        return run_sweep(
            not_measured(cases, path, device), path, bench, until=lambda: time.monotonic() > end
        )
    if part == "kernels":
        run_kernels(kernels, device, folder / "kernels.csv")
        return True
    return run_accuracy(accuracy, device, folder / "accuracy.csv")


def run_tests(path: Path) -> bool:
    """Run the tests that need a GPU, showing what pytest says and writing it into a file."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p"]
    with path.open("w", encoding="utf-8") as file:
        tests = subprocess.Popen(
            [*command, "no:cacheprovider"], cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        assert tests.stdout is not None
        for line in tests.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
        return tests.wait() == 0


def limited(command: list[str], seconds: float) -> int:
    """Run a command; its exit code, or 124 if it and all that it started was stopped after so many
    seconds."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_evidence(
    device: torch.device, folder: Path, minutes: float, run: Run = limited,
    clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Run all parts within about so many minutes, as processes that write into `folder`; whether
    all was right."""
    folder.mkdir(parents=True, exist_ok=True)
    end, good, said = clock() + 60 * minutes, True, []
    for part in PARTS:
        if part in GPU_PARTS and device.type != "cuda":
            continue
        command = [sys.executable, "-m", "perf", "evidence", "--only", part]
        command += ["--device", device.type, "--out", str(folder.resolve())]
        start = clock()
        if part == "sweep":
            code = _sweep(command, folder / "sweep.csv", run, clock, end - AFTER_SWEEP - GRACE)
        else:
            code = run(command, max(1, min(LIMITS[part], end - start)))
        good = good and code == 0
        said.append(f"{part}: exit code {code} after {clock() - start:.0f} s")
        print(said[-1], flush=True)
    print("\n".join(["", *said]))
    return good


def _sweep(command: list[str], path: Path, run: Run, clock: Callable[[], float], end: float) -> int:
    """Run the sweep until `end`, in a new process from the next shape on where one was lost with
    its device; the last exit code."""
    while True:
        before = _size(path)
        left = max(1, end - clock())
        code = run([*command, "--minutes", f"{left / 60:.2f}"], left + GRACE)
        if code in (0, 1) or clock() >= end or _size(path) == before:
            return code


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
