"""`python -m perf evidence`: on a machine with a GPU, check the kernels, measure them, keep it all.

Every part is a process of its own with a limit on its time, so that one that fails or hangs costs
the others nothing, and writes its rows as soon as it has them. It installs nothing and needs no
network."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread, Timer

import torch

from trigru import launch
from trigru.__main__ import main as trigru_main

from .accuracy import run_accuracy
from .kernels import run_kernels
from .measure import facts
from .readme import summary_of
from .shapes import SETS, long_and_short, profiled
from .sweep import make_bench, not_measured, run_sweep

PARTS = ("self-test", "diagnose", "compile", "tests", "floors", "sweep", "kernels", "accuracy")
GPU_PARTS = ("self-test", "diagnose", "compile", "tests", "floors")
EXPLAINING = ("diagnose", "compile", "tests")  # what is left to do where the self-test fails
# What a part may take in seconds. The sweep has what the others leave of the whole time.
LIMITS = {
    "self-test": 120, "diagnose": 150, "compile": 140, "tests": 300, "floors": 50, "kernels": 45,
    "accuracy": 60,
}  # fmt: skip
AFTER_SWEEP = LIMITS["kernels"] + LIMITS["accuracy"]
GRACE = 30  # seconds that a part has to end in by itself
SWEEP_SECONDS = 0.05  # to time a shape and mode
WRONG, LOST, FAILED, STOPPED = 1, 13, 14, 124  # exit codes of parts, none of them pytest's own

ROOT = Path(__file__).parents[1]
TEST = re.compile(r"^(tests/\S+\.py::\w+(?:\[.*?\])?)(?= |$)", re.M)  # as pytest -v begins a line
COMPILED = "TRIGRU_COMPILED"  # for pytest: what the tests launch has been compiled
NO_COMMIT = "UNKNOWN: without git, set TRIGRU_COMMIT"
Run = Callable[[list[str], float], int]  # a command and its limit in seconds → its exit code


def run_part(part: str, device: torch.device, folder: Path, minutes: float) -> bool:
    """Run one part in this process and write its file into `folder`; whether all was right.

    The sweep goes on where the file ends, and stops after about so many minutes. Raises
    DeviceLost where it ends for another reason."""
    on_cuda = device.type == "cuda"
    cases = list(SETS["core" if on_cuda else "smoke"]())
    accuracy, kernels = list(long_and_short(on_cuda)), list(profiled()) if on_cuda else cases[:1]
    end = time.monotonic() + 60 * minutes
    if part == "self-test":
        return run_self_test(device)
    if part == "diagnose":
        return diagnose(device, folder)
    if part == "compile":
        from .ahead import compile_all  # it needs Triton, which not every machine has

        return compile_all([*cases, *accuracy, *kernels], device, 60 * minutes)
    if part == "tests":
        return run_tests(folder / "tests.txt", end)
    if part == "floors":
        from .floor_kernels import run_floors

        return run_floors(cases, device, folder / "floors.csv")
    if part == "sweep":
        path = folder / "sweep.csv"
        bench = make_bench(device, SWEEP_SECONDS, folder / "floors.csv")
        return run_sweep(
            not_measured(cases, path, device), path, bench, until=lambda: time.monotonic() > end
        )
    if part == "kernels":
        return run_kernels(kernels, device, folder / "kernels.csv")
    return run_accuracy(accuracy, device, folder / "accuracy.csv")


def run_self_test(device: torch.device) -> bool:
    """What `python -m trigru` says; whether all was right."""
    from .ahead import compile_self_test

    compile_self_test(device)
    return trigru_main() == 0


def diagnose(device: torch.device, folder: Path) -> bool:
    """Look for the kernels that are wrong; whether there are none."""
    from .ahead import compile_trials
    from .diagnose import run_diagnosis, statuses, trials

    launch.WAIT_POLLS = 6_000_000  # in this process, for problems that take milliseconds
    path, dump = folder / "diagnose.csv", folder / "diagnose.pt"
    if not statuses(path):  # else a process before this one has begun
        dump.unlink(missing_ok=True)  # of other kernels
        compile_trials(trials(), device)
    return run_diagnosis(trials(), device, path, dump)


def run_tests(path: Path, end: float) -> bool:
    """Run the tests that need a GPU and write what pytest says into a file; whether some passed and
    none failed. Where one leaves the device in a bad state, a new process runs those that are left.
    At `end`, by time.monotonic(), pytest is asked to stop and to tell what it knows."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = os.environ | {COMPILED: "1"}  # the part before has done that
    codes: list[int] = []
    ran: list[str] = []
    path.write_text("", encoding="utf-8")
    while True:
        arguments = [argument for test in ran for argument in ("--deselect", test)]
        with path.open("a", encoding="utf-8") as file:
            tests = subprocess.Popen(
                command + arguments, cwd=ROOT, env=environment, encoding="utf-8", errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            timer = Timer(max(0, end - time.monotonic()), tests.send_signal, [signal.SIGINT])
            timer.start()
            assert tests.stdout is not None
            for line in tests.stdout:
                print(line, end="")
                file.write(line)
                file.flush()
            codes.append(tests.wait())
            timer.cancel()
        said = path.read_text(encoding="utf-8")
        before, ran = ran, TEST.findall(said)
        crashed = codes[-1] == LOST or codes[-1] < 0
        if not crashed or len(ran) == len(before) or time.monotonic() >= end:
            return not any(codes) and " passed" in said


def limited(command: list[str], seconds: float, log: Path) -> int:
    """Run a command, showing what it says and adding it to `log`; its exit code, or STOPPED if it
    and all that it started was stopped after so many seconds."""
    environment = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10"} | os.environ
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, encoding="utf-8", errors="replace",
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def tell() -> None:
        assert process.stdout is not None
        with log.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return STOPPED
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        teller.join(10)


def run_evidence(
    device: torch.device, folder: Path, minutes: float, run: Run | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> bool:  # fmt: skip
    """Run all parts within about so many minutes, as processes that write into `folder`; whether
    all was right."""
    folder.mkdir(parents=True, exist_ok=True)
    run = run or partial(limited, log=folder / "log.txt")
    here = facts(device)
    said = [
        f"{here['device']}, commit {here['commit'] or NO_COMMIT}, kernels {here['kernel_hash']}"
    ]
    print(said[0], flush=True)
    end, good, explain = clock() + 60 * minutes, True, False
    for part in PARTS:
        if part in GPU_PARTS and device.type != "cuda":
            continue
        if (part not in EXPLAINING) if explain else part == "diagnose":
            continue
        command = [sys.executable, "-m", "perf", "evidence", "--only", part]
        command += ["--device", device.type, "--out", str(folder.resolve())]
        start = clock()
        if part == "sweep":
            code = _to_the_end(command, folder / "sweep.csv", run, clock, end - AFTER_SWEEP)
        elif part == "diagnose":
            until = min(end, start + LIMITS[part])
            code = _to_the_end(command, folder / "diagnose.csv", run, clock, until)
        else:
            limit = max(1, min(LIMITS[part], end - start))
            code = run([*command, "--minutes", f"{(limit - GRACE) / 60:.2f}"], limit)
        explain = explain or (part == "self-test" and code != 0)
        good = good and code == 0
        said.append(f"{part}: exit code {code} after {clock() - start:.0f} s")
        print(said[-1], flush=True)
    if explain:
        from .diagnose import account

        said.append(f"the self-test failed: all that followed was {', '.join(EXPLAINING)}")
        said.append(account(folder / "diagnose.csv"))  # also of a part that was cut off
    print("\n".join(["", *said, ""]), flush=True)
    print(summary_of(folder))
    return good


def _to_the_end(
    command: list[str], path: Path, run: Run, clock: Callable[[], float], end: float
) -> int:
    """Run a part that appends to the file at `path` until `end`; 0, or the last exit code that was
    not. One that was cut short goes on in a new process with what comes next, as long as that gets
    it anywhere."""
    worst = 0
    while True:
        before = _size(path)
        left = max(1, end - clock())
        code = run([*command, "--minutes", f"{(left - GRACE) / 60:.2f}"], left)
        worst = code or worst
        if code in (0, WRONG) or clock() >= end or _size(path) == before:
            return worst


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
