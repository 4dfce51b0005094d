"""Timing, facts about the machine, and CSV files that keep every row as soon as it is written."""

import csv
import gc
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import trigru
from trigru.launch import uses_tf32

Call = Callable[[], Any]
Clock = Callable[[Sequence[Call]], list[float]]  # runs the calls in order → microseconds of each

KERNEL_SOURCES = (
    "exchange.py", "form.py", "tiles.py", "products.py", "forward.py", "backward.py", "launch.py",
    "plan.py", "ops.py", "derivatives.py", "layer.py", "reference.py",
)  # fmt: skip
FACTS = ("device", "sm", "driver", "torch", "triton", "cudnn", "commit", "kernel_hash", "date")
WARM_UP_ROUNDS = 3
LONG_ROUND, FEW = 0.2, 3  # seconds; rounds
HOST_CALLS, HOST_SECONDS = 5, 0.05  # at most, to time the host


def cpu_clock(calls: Sequence[Call]) -> list[float]:
    """Run the calls one after another; the wall time of each in microseconds."""
    times = []
    for call in calls:
        start = time.perf_counter()
        result = call()
        times.append(1e6 * (time.perf_counter() - start))
        del result  # freed outside the timed region
    return times


def cuda_clock(calls: Sequence[Call]) -> list[float]:
    """Enqueue the calls one after another; the time between the events around each, in
    microseconds.

    The host runs ahead of the device, as it does in a training loop: the Python of a call shows
    only where the device has nothing left to do."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in calls]
    ends = [torch.cuda.Event(enable_timing=True) for _ in calls]
    for start, call, end in zip(starts, calls, ends, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def clock_for(device: torch.device) -> Clock:
    """The clock that measures this kind of device, in microseconds."""
    return cuda_clock if device.type == "cuda" else cpu_clock


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of the call: its work on the device with no Python in between, and
    its results, the same tensors each time.

    Raises what the capture raises, RuntimeError for work that cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # restored also where the capture fails
        call()  # what libraries set up for a stream at its first use
        with torch.cuda.graph(graph, stream=stream):
            results = call()
    # The graph itself keeps nothing alive of what it reads: the parameters and inputs of `call`.
    return partial(_replay, graph, results, call)


def _replay(graph: torch.cuda.CUDAGraph, results: Any, call: Call) -> Any:
    graph.replay()
    return results


def is_lost(device: torch.device) -> bool:
    """Whether a failed kernel has left this process unable to use the device."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def interleave(
    calls: Mapping[str, Call], clock: Clock, seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """The microseconds of each of the named calls, run in turn: first, second, first, second, ….

    After WARM_UP_ROUNDS rounds, as many rounds as fit into `seconds`, by the last round of the
    warm-up, but at least `least` and at most `most`; of LONG_ROUND one warms up, and FEW follow."""
    names, once = list(calls), list(calls.values())
    last_round = clock(once)
    if sum(last_round) > 1e6 * LONG_ROUND:
        least = min(FEW, least)
    else:
        last_round = clock(once * (WARM_UP_ROUNDS - 1))[-len(once) :]
    rounds = int(1e6 * seconds / max(sum(last_round), 1.0))
    times = clock(once * min(most, max(least, rounds)))
    return {name: times[i :: len(names)] for i, name in enumerate(names)}


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, in the unit of `times`, between two values by
    proportion."""
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def alone(call: Call, device: torch.device) -> tuple[float | None, int | None]:
    """What a call costs that is in no graph and comes when the device has nothing to do: the
    microseconds until it returns, though the device is not done yet, the median of a few calls; and
    the most CUDA memory in bytes that it held at once, above what was held before it.

    None of both on a CPU, where a call returns when it is done."""
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds: list[float] = []
    while len(seconds) < HOST_CALLS and sum(seconds) < HOST_SECONDS:
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        del result
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return 1e6 * statistics.median(seconds), peak


@contextmanager
def garbage_by_hand() -> Iterator[None]:
    """Garbage is collected by gc.collect() alone, which looks only at what came since: a look at
    everything takes a tenth of a second, and in the middle of a capture it can break it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def dtype_name(dtype: str, device: torch.device) -> str:
    """What a case's dtype is called where it is measured: "tf32" for the products of "fp32" there,
    unless PyTorch is told otherwise."""
    return "tf32" if dtype == "fp32" and uses_tf32(device) else dtype


def facts(device: torch.device) -> dict[str, Any]:
    """Where and with what this process measures: the columns FACTS except `date`. What does not
    exist here, as the driver of a CPU, is empty."""
    on_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_cuda else ()
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "sm": "".join(map(str, capability)),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_cuda
        else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": torch.backends.cudnn.version() if on_cuda else "",
        "commit": _commit(),
        "kernel_hash": kernel_hash(),
    }


def now() -> str:
    """The time in UTC to the second, as ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def kernel_hash() -> str:
    """The first 12 hex digits of the SHA-256 over KERNEL_SOURCES, which decide what runs on the
    device."""
    digest = hashlib.sha256()
    for name in KERNEL_SOURCES:
        digest.update((Path(trigru.__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]


def reason(error: Exception) -> str:
    """The type and the first line of what an exception says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add one row to a CSV file and flush it; a new file gets the columns as its header.

    Raises ValueError if the row or the file has other columns."""
    if set(row) != set(columns):
        raise ValueError(f"the row's columns differ: {sorted(set(row) ^ set(columns))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        file.seek(0, os.SEEK_END)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if header is None:
            writer.writeheader()
        elif header != list(columns):
            raise ValueError(f"{path} has other columns: {header}")
        writer.writerow({k: "" if v is None else v for k, v in row.items()})


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line for line in file if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    threads = torch.get_num_threads()
    return f"CPU: {name}, {threads} thread{'s' * (threads > 1)}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the sources, with a + if they have been changed since; in a copy without git,
    what the environment's TRIGRU_COMMIT says."""
    root = str(Path(trigru.__file__).parent)
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return os.environ.get("TRIGRU_COMMIT", "")
    return commit + "+" * bool(_output("git", "-C", root, "status", "--porcelain", "."))


@cache
def _output(*command: str) -> str:
    """The first line that a command prints, empty if it fails or does not exist. Each runs once in
    a process, for nvidia-smi takes its time."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()
