"""`python -m perf kernels`: which kernels each provider launches, by PyTorch's profiler."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trigru.accuracy import products_as_in_rnns

from .measure import FACTS, append_row, dtype_name, facts, now
from .problem import first_call, make_problem
from .progress import tqdm
from .providers import NoKernel, builders
from .shapes import MODES, Case

COLUMNS = (
    *FACTS, "provider", "variant", "mode", "dtype", "T", "B", "I", "H", "kernel", "launches", "us",
    "status",
)  # fmt: skip


def run_kernels(cases: Sequence[Case], device: torch.device, path: Path) -> bool:
    """Profile one call of TriGRU and of the yardstick in both modes, and append a row for each
    kernel that it launched to the CSV file at `path`: how often, and for how many microseconds in
    all. On a CPU the rows are of torch operations. Whether every call launched something."""
    here, on_cuda, good = facts(device), device.type == "cuda", True
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with products_as_in_rnns():
        for case in tqdm(cases, desc="kernels"):
            problem = make_problem(case, device)
            shape = case._asdict() | {"dtype": dtype_name(case.dtype, device)}
            two = list(builders(case, device).items())[:2]
            for mode, (name, build) in product(MODES, two):
                try:
                    provider = build(case, problem.weights, mode == "training")
                except NoKernel:
                    continue
                call, _, remark = first_call(provider, problem, mode)
                with profile(activities=activities) as profiler:
                    call()
                    if on_cuda:
                        torch.cuda.synchronize(device)
                row = here | {"date": now(), "provider": name, "mode": mode} | shape
                row |= {"status": f"ok: {remark}" if remark else "ok"}
                events = [e for e in profiler.key_averages() if e.device_type == kind]
                good = good and bool(events)
                for event in events:
                    time = event.self_device_time_total if on_cuda else event.self_cpu_time_total
                    row |= {"kernel": event.key, "launches": event.count, "us": round(time, 3)}
                    append_row(path, COLUMNS, {column: row[column] for column in COLUMNS})
    return good
