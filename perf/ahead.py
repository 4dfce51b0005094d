"""Compile many kernels at once, one on each core, into Triton's cache.

One after another, as they are first used, they would take longer than all measurements do."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from trigru import backward, forward, reference, tiles
from trigru.__main__ import computed, problems
from trigru.accuracy import problem
from trigru.launch import is_exact
from trigru.plan import DeviceLimits, LaunchPlan, NoPlan, device_limits, plan_launch

from . import floor_kernels
from .diagnose import Trial, launched, make_problem, plan_of
from .floor_kernels import has_barrier
from .floors import Exchange, exchanges
from .measure import Call
from .progress import tqdm
from .providers import DTYPES
from .shapes import Case

Job = Callable[[torch.device], None]

MOST_WORKERS = 16  # each takes memory of the device
ROOT = Path(__file__).parents[1]
# For pytest: the folder in which processes agree on who runs which test; see compile_tests.
COMPILE_ONLY = "TRIGRU_COMPILE_ONLY"
PYTEST_CODES = (0, 1, 5)  # all passed, some failed, there were none


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


def compile_ahead(cases: Sequence[Case], device: torch.device) -> bool:
    """Compile what the cases launch on a CUDA device, forward and training; whether all of it
    compiled. What did not is left to fail where it is used."""
    if device.type != "cuda":
        return True
    device = torch.device("cuda", torch.cuda.current_device())
    return run_on_all_cores(jobs_of(cases, device_limits(device)), device, compile_only)


def compile_all(cases: Sequence[Case], device: torch.device, seconds: float) -> bool:
    """As above what the GPU tests launch, within about so many seconds, then what measures the
    floors of the cases, and what they launch, of which the last are measured last."""
    device = torch.device("cuda", torch.cuda.current_device())
    limits = device_limits(device)
    jobs: list[Job] = [
        partial(compile_exchange, *e) for e in exchange_kernels(cases, limits).items()
    ]
    jobs += jobs_of(cases, limits)
    with TemporaryDirectory() as folder:
        tests = partial(compile_tests, (), folder, seconds)
        return run_on_all_cores([*[tests] * workers(), *jobs], device, compile_only)


def jobs_of(cases: Iterable[Case], limits: DeviceLimits) -> list[Job]:
    return [partial(compile_kernel, kernel) for kernel in dict.fromkeys(kernels_of(cases, limits))]


def compile_ahead_of_tests(tests: Sequence[str], seconds: float) -> bool:
    """Compile what these tests launch, as pytest names them, within about so many seconds; whether
    that went well. It says nothing of whether the tests pass."""
    with TemporaryDirectory() as folder:
        job = partial(compile_tests, tests, folder, seconds)
        return run_on_all_cores([job] * min(workers(), len(tests)), torch.device("cuda"), nothing)


def compile_self_test(device: torch.device) -> bool:
    """Compile what `python -m trigru` launches; whether all of it compiled."""
    jobs = [partial(compile_problem, *problem) for problem in problems(device)]
    return run_on_all_cores(jobs, device, compile_launches)


def compile_trials(trials: Iterable[Trial], device: torch.device) -> bool:
    """Compile what perf.diagnose launches; whether all of it compiled."""
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = {(trial.kernel, plan_of(trial, device)): trial for trial in trials}
    jobs = [partial(compile_trial, trial) for trial in kernels.values()]
    return run_on_all_cores(jobs, device, compile_launches)


def compile_problem(
    textbook: bool, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Where launches compile: one problem of the self-test."""
    computed(*problem(*shape, textbook=textbook, dtype=dtype, device=device), textbook)


def compile_trial(trial: Trial, device: torch.device) -> None:
    """Where launches compile: one trial of perf.diagnose."""
    launched(trial, make_problem(trial, device))


def workers() -> int:
    return min(MOST_WORKERS, os.cpu_count() or 1)


def run_on_all_cores(jobs: Sequence[Job], device: torch.device, set_up: Call) -> bool:
    """Run the jobs in processes that have called `set_up`, and where float32's products are as they
    are here; whether none raised anything. The first thing that one raised is told."""
    good, context = True, get_context("spawn")  # CUDA does not survive a fork
    precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    with ProcessPoolExecutor(workers(), context, begin_worker, (set_up, precision)) as pool:
        done = as_completed([pool.submit(job, device) for job in jobs])
        for future in tqdm(done, desc="compile", total=len(jobs)):
            if error := future.exception():
                if good:
                    tqdm.write(f"not compiled: {type(error).__name__}: {error}")
                good = False
    return good


def begin_worker(set_up: Call, precision: str) -> None:
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]
    set_up()


def kernels_of(cases: Iterable[Case], limits: DeviceLimits) -> Iterator[Kernel]:
    """The kernels that the cases launch, some of them more than once."""
    for case in cases:
        textbook, dtype = case.variant == "textbook", DTYPES[case.dtype]
        exact = is_exact(dtype, torch.device("cuda"))
        for backward_, save in ((False, False), (False, True), (True, False)):
            try:
                plan = plan_launch(
                    limits, B=case.B, H=case.H, D=case.directions, itemsize=dtype.itemsize,
                    backward=backward_, textbook=textbook, exact=exact,
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
        1, 1, 1, exchange.slices, exchange.H_pad, dtype=DTYPES[exchange.dtype], device=device
    )
    arrived = torch.empty(1, 32, dtype=torch.int32, device=device)
    floor_kernels.exchange_alone(y, arrived, exchange, plan, barrier)


def compile_tests(tests: Sequence[str], folder: str, seconds: float, device: torch.device) -> None:
    """Run GPU tests for the kernels that they launch alone: their launches compile, the reference
    computes, and how they end says nothing. All processes with the same `folder` share the tests;
    one that crashes leaves those that nobody has begun to the others. No tests: all of them."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=no", "--no-header"]
    command += ["-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {COMPILE_ONLY: folder}, encoding="utf-8",
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds,
    )  # fmt: skip
    if done.returncode not in PYTEST_CODES:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}")


def compile_launches() -> None:
    """From here on this process compiles what it would launch. What the launches would have
    computed the reference does, so that the code around them goes on to the next."""
    compile_only()
    forward.gru_forward = then(forward.gru_forward, reference.gru_forward)
    backward.gru_backward = then(backward.gru_backward, reference.gru_backward)


def then(launcher: Callable, computed: Callable) -> Callable:
    """A launcher that ends in what `computed` makes of the same arguments but the plan."""

    def both(*args: Any, plan: LaunchPlan, **switches: Any) -> Any:
        launcher(*args, plan=plan, **switches)
        return computed(*args, **switches)

    return both


def compile_only() -> None:
    """From here on the launches of this process's kernels compile them and nothing more."""
    forward._gru_forward_kernel = CompileOnly(forward._gru_forward_kernel)
    backward._gru_backward_kernel = CompileOnly(backward._gru_backward_kernel)
    tiles._pack_resets_kernel = CompileOnly(tiles._pack_resets_kernel)
    floor_kernels._exchange_kernel = CompileOnly(floor_kernels._exchange_kernel)


def nothing() -> None:
    pass
