"""The pieces that floors are made of, measured: the device's rates, and the exchange alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import globaltimer

from trigru import launch
from trigru.exchange import await_tiles, begin, publish, settle, unwritten
from trigru.form import Form
from trigru.launch import (
    ExchangeTimeout,
    compile_options,
    compile_time,
    error_flag,
    raise_if_failed,
)
from trigru.plan import LaunchPlan, device_limits
from trigru.tiles import awaited_offsets, awaited_rows, barrier, own_offsets

from .floors import COLUMNS, PRODUCTS, Exchange, exchanges
from .measure import (
    Call,
    Clock,
    append_row,
    captured,
    clock_for,
    facts,
    interleave,
    now,
    percentiles,
)
from .progress import tqdm
from .providers import DTYPES
from .shapes import Case

# A long launch has at most so many steps, and as few as L2 holds, but enough to be timed. A short
# one has a part of them: their difference is steps alone.
MOST_STEPS, LEAST_STEPS, L2_BYTES, SHORT_PART = 1000, 50, 16 * 2**20, 5
ROUNDS = 9  # of both
SECONDS = 0.05  # to measure a constant, about
LAUNCHES = 100  # in a row, as one measurement
SPIN_NANOSECONDS = 1_000_000
COPIED_BYTES = 2**30  # far more than a cache holds


def run_floors(
    cases: Sequence[Case], device: torch.device, path: Path, *, clock: Clock | None = None
) -> bool:
    """Measure the device's constants, then the exchange of every group plan that these cases have,
    and append a row for each to the CSV file at `path`. Whether none gave up waiting."""
    if device.type != "cuda":
        raise ValueError(f"floors are measured on a CUDA device, not on {device.type}")
    here, clock = facts(device), clock or clock_for(device)

    def write(name: str, values: Sequence[float], unit: str, **what: Any) -> None:
        p20, p50, p80 = (round(p, 4) for p in percentiles(values))
        row = here | {"date": now()} | dict.fromkeys(Exchange._fields) | what
        row |= {"name": name, "p20": p20, "p50": p50, "p80": p80, "unit": unit}
        append_row(path, COLUMNS, row)

    with torch.cuda.device(device):
        for name, dtype, values, unit in measure_constants(device, clock):
            write(name, values, unit, dtype=dtype)
        plans = exchanges(cases, device_limits(device))
        good = True
        for exchange, plan in tqdm(plans.items(), desc="floors"):
            for barrier in (False, True)[: 1 + has_barrier(exchange)]:
                try:
                    values = measure_exchange(exchange, plan, device, clock, barrier=barrier)
                except ExchangeTimeout as error:
                    tqdm.write(f"{exchange}: {error}")
                    good = False
                else:
                    name = "barrier" if barrier else "exchange"
                    write(name, values, "us", **exchange._asdict())
    return good


def has_barrier(exchange: Exchange) -> bool:
    """Whether a barrier is measured too: for comparison, the simplest exchanges are enough."""
    return exchange.slices == exchange.turns == 1


# The exchange alone


@gluon.jit(do_not_specialize=["T", "rows", "wait_limit"])
def _exchange_kernel(
    y_ptr,  # [T, groups, rows, SLICES, H_PAD]  exchanged
    arrived_ptr,  # [groups, 32]  of which the first counts who came to the barrier, BARRIER only
    error_ptr,
    T,
    rows,
    wait_limit,  # polls
    FORM: gl.constexpr,
    SLICES: gl.constexpr,
    BARRIER: gl.constexpr,
):
    """The library's time loop without its arithmetic: store a slice, await the whole tile.

    With BARRIER the group meets between the two, so that nothing is left to be awaited."""
    L: gl.constexpr = FORM.out
    ROW: gl.constexpr = SLICES * FORM.H_PAD
    group = gl.program_id(1)
    unit = gl.program_id(0) * FORM.BLOCK_H + gl.arange(0, FORM.BLOCK_H, gl.SliceLayout(1, L))
    n_row = gl.arange(0, FORM.BLOCK_B, gl.SliceLayout(0, L))
    mask = (unit < FORM.H_PAD)[:, None] & (n_row < rows)[None, :]  # [BLOCK_H, BLOCK_B]
    own = own_offsets(unit, ROW, L, FORM)
    awaited = awaited_offsets(awaited_rows(rows - 1, FORM), ROW, FORM)

    y = y_ptr + group.to(gl.int64) * rows * ROW
    step = gl.num_programs(1).to(gl.int64) * rows * ROW
    # Another value in each element and in each step, so that a wrong one is seen.
    value = ((group * FORM.BLOCK_B + n_row)[None, :] * FORM.H_PAD + unit[:, None]).to(gl.float32)
    for t in range(T):
        for s in gl.static_range(SLICES):
            publish(y + s * FORM.H_PAD + own, value + s, mask, FORM)
        if BARRIER:
            met = (t + 1) * gl.num_programs(0)
            meet(arrived_ptr + group * 32, met, wait_limit, error_ptr)
        await_all(y + awaited, wait_limit, error_ptr, SLICES * FORM.CHUNKS, FORM)
        # What is published next depends on the whole tile, though on none of its values: no thread
        # comes past here before all of the program have what they wait for.
        barrier()
        value += SLICES
        y += step


@gluon.jit
def await_all(ptrs, limit, error_ptr, TILES: gl.constexpr, FORM: gl.constexpr):
    """Wait for what a product takes, as it does: tiles that would go through stages one by one,
    with the next ones under way, but not through the stages."""
    tiles = await_tiles(ptrs, limit, error_ptr, TILES, 1, FORM)
    if FORM.STAGES > 0:
        begun = tiles[1]
        for c in gl.static_range(1, TILES):
            if c + len(begun) < TILES:
                begun = begun + (begin(ptrs, c + len(begun), FORM),)  # noqa: RUF005
            settle(begun[0], ptrs, limit, error_ptr, c, FORM)
            begun = begun[1:]


# One thread waits for the count, and the others for that thread.
_COUNT_ASM = gl.constexpr("""{
.reg .pred p;
.reg .b32 i;
mov.u32 $0, %tid.x;
setp.ne.u32 p, $0, 0;
@p bra DONE;
mov.u32 i, 0;
TRY:
ld.acquire.gpu.global.b32 $0, [$1];
setp.ge.s32 p, $0, $2;
@p bra DONE;
add.u32 i, i, 1;
setp.lt.u32 p, i, $3;
@p bra TRY;
mov.b32 $0, 1;
st.relaxed.sys.global.b32 [$4], $0;
DONE:
}""")


@gluon.jit
def meet(arrived_ptr, count, limit, error_ptr):
    """Wait until `count` arrivals were counted, of this program and the others of its group.

    What a program stored before it, all of them can load after it."""
    barrier()  # all threads have stored before one of them says so
    gl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    gl.inline_asm_elementwise(
        _COUNT_ASM, "=&r,l,r,r,l",
        [arrived_ptr.to(gl.int64), count, limit, error_ptr.to(gl.int64)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    barrier()  # and none loads before that one knows


def measure_exchange(
    exchange: Exchange, plan: LaunchPlan, device: torch.device, clock: Clock, barrier: bool = False
) -> list[float]:
    """The microseconds of a step, once for each round: by how much a long launch takes longer than
    a short one, for each step that it has more."""
    like = torch.empty(0, dtype=DTYPES[exchange.dtype], device=device)
    units = exchange.programs * exchange.BLOCK_H
    tile = exchange.groups, exchange.rows, exchange.slices, exchange.H_pad
    step_bytes = exchange.turns * math.prod(tile) * like.itemsize
    long = max(LEAST_STEPS, min(MOST_STEPS, L2_BYTES // step_bytes))
    short = long // SHORT_PART
    y = unwritten(long * exchange.turns, *tile, H=units, like=like)
    # A cache line for each group: neighbours would slow each other down.
    arrived = torch.zeros(exchange.groups, 32, dtype=torch.int32, device=device)
    calls: dict[str, Call] = {}
    for name, tensor in (("short", y[: short * exchange.turns]), ("long", y)):
        calls[f"{name}, reset"] = partial(reset, tensor, arrived, units)
        calls[name] = partial(exchange_alone, tensor, arrived, exchange, plan, barrier)
    for call in calls.values():
        call()
        if y.is_cuda:
            torch.cuda.synchronize(y.device)
        raise_if_failed(y.device)  # before many more launches that would wait as long
    times = interleave(calls, clock, seconds=0, least=ROUNDS)
    raise_if_failed(y.device)
    pairs = zip(times["short"], times["long"], strict=True)
    return [(b - a) / (long - short) for a, b in pairs]


def reset(y: Tensor, arrived: Tensor, units: int) -> None:
    """Nothing has arrived, and nobody."""
    y.view(torch.uint8).fill_(255)
    y[..., units:] = 0  # padding
    arrived.zero_()


def exchange_alone(
    y: Tensor, arrived: Tensor, exchange: Exchange, plan: LaunchPlan, barrier: bool
) -> None:
    """Hand over y (T, groups, rows, slices, H_pad), step by step."""
    _exchange_kernel[(exchange.programs, exchange.groups, 1)](
        y, arrived, error_flag(y.device), len(y), exchange.rows, launch.WAIT_POLLS,
        FORM=form_of(plan), SLICES=exchange.slices, BARRIER=barrier, num_warps=plan.num_warps,
        launch_cooperative_grid=True, **compile_options(),
    )  # fmt: skip


def form_of(plan: LaunchPlan) -> Form:
    """The plan's form, but the same for all plans that exchange the same."""
    plan = replace(plan, H=plan.H_pad, u_shared=plan.chunks)
    return compile_time(plan, exact=False)["FORM"]


# The device's constants


@triton.jit
def _empty_kernel(unused_ptr):
    pass


@triton.jit
def clock64():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["nanoseconds"])
def _spin_kernel(spent_ptr, nanoseconds):
    """Be busy for so long; store the nanoseconds and the SM's clocks that went by."""
    start = globaltimer()
    first_clock = clock64()
    passed = globaltimer() - start
    while passed < nanoseconds:
        passed = globaltimer() - start
    clocks = clock64() - first_clock
    tl.store(spent_ptr, passed)
    tl.store(spent_ptr + 1, clocks)


def measure_constants(
    device: torch.device, clock: Clock
) -> Iterator[tuple[str, str, list[float], str]]:
    """(name, dtype, values, unit) of what does not depend on a plan."""

    def times(call: Call) -> list[float]:
        return interleave({"call": call}, clock, SECONDS)["call"]

    size = min(COPIED_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    copied = times(partial(target.copy_, source))
    yield "bandwidth", "", [2 * size / t / 1e3 for t in copied], "GB/s"

    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for name, dtype in PRODUCTS.items():
        n = 4096 if name == "fp32" else 8192  # in full, float32 takes long
        a, b = torch.randn(2, n, n, dtype=dtype, device=device)
        matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        multiplied = times(partial(torch.mm, a, b))
        matmul.fp32_precision = before
        yield "matmul", name, [2 * n**3 / t / 1e6 for t in multiplied], "TFLOP/s"

    spent = torch.zeros(2, dtype=torch.int64, device=device)
    busy = partial(_spin_kernel[(1,)], spent, SPIN_NANOSECONDS, num_warps=1)
    rates = []
    for _ in range(ROUNDS):
        busy()
        nanoseconds, clocks = spent.tolist()
        rates.append(1e3 * clocks / nanoseconds)
    yield "clock", "", rates, "MHz"

    empty = partial(_empty_kernel[(1,)], spent, num_warps=1)

    def launches() -> None:
        for _ in range(LAUNCHES):
            empty()

    yield "launch", "", [t / LAUNCHES for t in times(launches)], "us"
    # While the device is busy the host gets ahead of it, so that its own time does not count.
    calls: dict[str, Call] = {"busy": busy, "graph": captured(empty)}
    yield "graph", "", interleave(calls, clock, SECONDS)["graph"], "us"
