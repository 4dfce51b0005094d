"""Compile the kernels of many shapes at once, one on each core, into Triton's cache.

One after another, as they are first used, they would take longer than all measurements do."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from trigru import backward, forward
from trigru.plan import DeviceLimits, LaunchPlan, NoPlan, device_limits, plan_launch

from . import floor_kernels
from .floor_kernels import has_barrier
from .floors import Exchange, exchanges
from .measure import Call
from .providers import DTYPES
from .shapes import Case

Job = Callable[[torch.device], None]

MOST_WORKERS = 16  # each takes memory of the device


class Kernel(NamedTuple):
    """One kernel to compile, as a layer with biases launches it."""

    plan: LaunchPlan
    dtype: str
    textbook: bool
    backward: bool
    save: bool  # of the forward kernel: whether for training
    packed: bool


class CompileOnly:
    """Stands in for a kernel whose launches are to compile it and nothing more."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.kernel.warmup, grid=grid)


def compile_ahead(cases: Sequence[Case], device: torch.device, floors: bool = False) -> bool:
    """Compile what the cases launch on a CUDA device, forward and training, and with `floors` what
    measures their floors; whether all of it compiled. What did not is left to fail where it is
    used."""
    if device.type != "cuda":
        return True
    device = torch.device("cuda", torch.cuda.current_device())
    limits = device_limits(device)
    kernels = dict.fromkeys(kernels_of(cases, limits))
    jobs: list[Job] = [partial(compile_kernel, kernel) for kernel in kernels]
    if floors:
        jobs += [partial(compile_exchange, *e) for e in exchange_kernels(cases, limits).items()]
    return run_on_all_cores(jobs, device, _compile_only)


def run_on_all_cores(jobs: Sequence[Job], device: torch.device, set_up: Call) -> bool:
    """Run the jobs in processes that have called `set_up`; whether none raised anything. The first
    thing that one raised is told."""
    good, context = True, get_context("spawn")  # CUDA does not survive a fork
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, initializer=set_up) as pool:
        done = as_completed([pool.submit(job, device) for job in jobs])
        for future in tqdm(done, desc="compile", total=len(jobs)):
            if error := future.exception():
                if good:
                    tqdm.write(f"not compiled: {type(error).__name__}: {error}")
                good = False
    return good


def kernels_of(cases: Iterable[Case], limits: DeviceLimits) -> Iterator[Kernel]:
    """The kernels that the cases launch, some of them more than once."""
    for case in cases:
        textbook = case.variant == "textbook"
        for backward_, save in ((False, False), (False, True), (True, False)):
            try:
                plan = plan_launch(
                    limits, B=case.B, H=case.H, D=case.directions,
                    itemsize=DTYPES[case.dtype].itemsize, backward=backward_, textbook=textbook,
                )  # fmt: skip
            except NoPlan:
                continue
            yield Kernel(plan, case.dtype, textbook, backward_, save, case.packed)


def compile_kernel(kernel: Kernel, device: torch.device, T: int = 1, B: int = 1) -> None:
    """Go through the library's own launcher, whose kernels are CompileOnly: T and B are not
    compiled in."""
    plan, textbook = kernel.plan, kernel.textbook
    D, H = plan.D, plan.H

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPES[kernel.dtype], device=device)

    shape = (T * B,) if kernel.packed else (T, B)
    h0, w_hh, y = new(D, B, H), new(D, 3 * H, H), new(*shape, D, H)
    switches: dict[str, Any] = {
        "offsets": torch.arange(0, T * B + 1, B, device=device) if kernel.packed else None,
        "textbook": textbook, "reverse": False, "bidirectional": D == 2,
        "plan": plan,
    }  # fmt: skip
    if kernel.backward:
        gates = new(*shape, D, 3 if textbook else 4, H)
        backward.gru_backward(y, new(D, B, H), h0, w_hh, y, gates, **switches)
    else:
        b_hh = None if textbook else new(D, 3 * H)
        forward.gru_forward(new(*shape, D, 3 * H), h0, w_hh, b_hh, save=kernel.save, **switches)


def exchange_kernels(
    cases: Sequence[Case], limits: DeviceLimits
) -> dict[tuple[Exchange, bool], LaunchPlan]:
    """The kernels that measure the exchanges of the cases, and the barriers, each with a plan."""
    return {
        (exchange._replace(programs=1, groups=1, rows=1, turns=1), barrier): plan
        for exchange, plan in exchanges(cases, limits).items()  # those four are not compiled in
        for barrier in (False, True)[: 1 + has_barrier(exchange)]
    }


def compile_exchange(key: tuple[Exchange, bool], plan: LaunchPlan, device: torch.device) -> None:
    """Go through the launcher that measures, whose kernel is CompileOnly."""
    exchange, barrier = key
    y = torch.empty(
        1, 1, 1, exchange.slices * exchange.H_pad, dtype=DTYPES[exchange.dtype], device=device
    )
    arrived = torch.empty(1, 32, dtype=torch.int32, device=device)
    floor_kernels.exchange_alone(y, arrived, exchange, plan, barrier)


def _compile_only() -> None:
    forward._gru_forward_kernel = CompileOnly(forward._gru_forward_kernel)
    backward._gru_backward_kernel = CompileOnly(backward._gru_backward_kernel)
    floor_kernels._exchange_kernel = CompileOnly(floor_kernels._exchange_kernel)
