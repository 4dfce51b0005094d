"""`python -m perf kernels`: which kernels each provider launches, by PyTorch's profiler."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from trigru.accuracy import products_as_in_rnns

from .measure import FACTS, append_row, dtype_name, facts, now
from .problem import make_call, make_problem
from .providers import NoKernel, builders
from .shapes import MODES, Case

COLUMNS = (
    *FACTS, "provider", "variant", "mode", "dtype", "T", "B", "I", "H", "kernel", "launches", "us",
)  # fmt: skip


def run_kernels(cases: Sequence[Case], device: torch.device, path: Path) -> None:
    """Profile one call of each provider in both modes, and append a row for each kernel that it
    launched to the CSV file at `path`: how often, and for how many microseconds in all. On a CPU
    the rows are of torch operations."""
    here, on_cuda = facts(device), device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with products_as_in_rnns():
        for case in tqdm(cases, desc="kernels"):
            problem = make_problem(case, device)
            shape = case._asdict() | {"dtype": dtype_name(case.dtype, device)}
            for mode, (name, build) in (
                (mode, item) for mode in MODES for item in builders(case, device).items()
            ):
                try:
                    provider = build(case, problem.weights, mode == "training")
                except NoKernel:
                    continue
                call = make_call(provider, problem, mode)
                call()
                with profile(activities=[activity]) as profiler:
                    call()
                    if on_cuda:
                        torch.cuda.synchronize(device)
                row = here | {"date": now(), "provider": name, "mode": mode} | shape
                for event in profiler.key_averages():
                    if (event.device_type == DeviceType.CUDA) != on_cuda:
                        continue  # what the host did
                    time = event.self_device_time_total if on_cuda else event.self_cpu_time_total
                    row |= {"kernel": event.key, "launches": event.count, "us": round(time, 3)}
                    append_row(path, COLUMNS, {column: row[column] for column in COLUMNS})
