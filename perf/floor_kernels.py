"""The pieces that floors are made of, measured: the device's rates, and the exchange alone."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from trigru.exchange import deadline_from_now, peek, publish, settle, unwritten
from trigru.launch import ExchangeTimeout, compile_options, error_flag, raise_if_failed, wait_limit
from trigru.plan import LaunchPlan, device_limits
from trigru.tiles import beside_operand, operand_offsets

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


@triton.jit(do_not_specialize=["T", "rows", "wait_limit"])
def _exchange_kernel(
    y_ptr,  # [T, groups, rows, SLICES, H_PAD]  exchanged
    arrived_ptr,  # [groups, 32]  of which the first counts who came to the barrier, BARRIER only
    error_ptr,
    T,
    rows,
    wait_limit,
    H_PAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPIN: tl.constexpr,
    SLICES: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """The library's time loop without its arithmetic: store a slice, await the whole tile.

    With BARRIER the group meets between the two, so that nothing is left to be awaited."""
    ROW: tl.constexpr = SLICES * H_PAD
    CHUNKS: tl.constexpr = ROW // BLOCK_K
    deadline = deadline_from_now(wait_limit, SPIN)

    group = tl.program_id(1)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    offs_b = tl.arange(0, BLOCK_B)  # [BLOCK_B]
    mask_b = offs_b < rows
    mask = (offs_h < H_PAD)[:, None] & mask_b[None, :]  # [BLOCK_H, BLOCK_B]
    mask_operand = beside_operand(mask_b, SPLIT_K)
    own = offs_b[None, :] * ROW + offs_h[:, None]  # [BLOCK_H, BLOCK_B]
    offs_operand = operand_offsets(offs_b, ROW, BLOCK_K, SPLIT_K)

    y = y_ptr + group.to(tl.int64) * rows * ROW
    step = tl.num_programs(1).to(tl.int64) * rows * ROW
    # Another value in each element and in each step, so that a wrong one is seen.
    value = ((group * BLOCK_B + offs_b)[None, :] * H_PAD + offs_h[:, None]).to(tl.float32)
    for t in range(T):
        for s in tl.static_range(SLICES):
            publish(y + own + s * H_PAD, value + s, mask)
        if BARRIER:
            met = (t + 1) * tl.num_programs(0)
            meet(arrived_ptr + group * 32, met, deadline, error_ptr, SPIN)
        ahead = peek(y + offs_operand, mask_operand)
        for c in tl.static_range(CHUNKS):
            chunk = y + offs_operand + c * BLOCK_K
            settle(ahead, chunk, mask_operand, deadline, error_ptr, SPIN)
            if c + 1 < CHUNKS:
                ahead = peek(chunk + BLOCK_K, mask_operand)
        # What is published next depends on the whole tile, though on none of its values: no thread
        # comes past here before all of the program have what they wait for.
        tl.debug_barrier()
        value += SLICES
        y += step


# One thread waits for the count, and the others for that thread.
_COUNT_ASM = tl.constexpr("""{
.reg .pred p;
.reg .b64 d;
mov.u32 $0, %tid.x;
setp.ne.u32 p, $0, 0;
@p bra DONE;
TRY:
ld.acquire.gpu.global.b32 $0, [$1];
setp.ge.s32 p, $0, $2;
@p bra DONE;
mov.u64 d, %globaltimer;
setp.lt.s64 p, d, $3;
@p bra TRY;
mov.b32 $0, 1;
st.relaxed.sys.global.b32 [$4], $0;
DONE:
}""")


@triton.jit
def meet(arrived_ptr, count, deadline, error_ptr, SPIN: tl.constexpr):
    """Wait until `count` arrivals were counted, of this program and the others of its group.

    What a program stored before it, all of them can load after it."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")
    if SPIN > 0:
        tl.inline_asm_elementwise(
            _COUNT_ASM,
            "=&r,l,r,l,l",
            [arrived_ptr.to(tl.int64), count, deadline, error_ptr.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        polls = 0
        arrived = tl.load(arrived_ptr, volatile=True)
        while arrived < count:
            polls += 1
            if polls >= deadline:
                tl.store(error_ptr, 1)
            failed = tl.load(error_ptr, volatile=True)
            arrived = tl.where(failed != 0, count, tl.load(arrived_ptr, volatile=True))
    tl.debug_barrier()  # and none loads before that one knows


def measure_exchange(
    exchange: Exchange, plan: LaunchPlan, device: torch.device, clock: Clock, barrier: bool = False
) -> list[float]:
    """The microseconds of a step, once for each round: by how much a long launch takes longer than
    a short one, for each step that it has more."""
    like = torch.empty(0, dtype=DTYPES[exchange.dtype], device=device)
    row = exchange.slices * exchange.H_pad
    step_bytes = exchange.turns * exchange.groups * exchange.rows * row * like.itemsize
    long = max(LEAST_STEPS, min(MOST_STEPS, L2_BYTES // step_bytes))
    short = long // SHORT_PART
    y = unwritten(long * exchange.turns, exchange.groups, exchange.rows, row, like=like)
    # A cache line for each group: neighbours would slow each other down.
    arrived = torch.zeros(exchange.groups, 32, dtype=torch.int32, device=device)
    calls: dict[str, Call] = {}
    for name, tensor in (("short", y[: short * exchange.turns]), ("long", y)):
        calls[f"{name}, reset"] = partial(reset, tensor, arrived)
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


def reset(y: Tensor, arrived: Tensor) -> None:
    """Nothing has arrived, and nobody."""
    y.view(torch.uint8).fill_(255)
    arrived.zero_()


def exchange_alone(
    y: Tensor, arrived: Tensor, exchange: Exchange, plan: LaunchPlan, barrier: bool
) -> None:
    """Hand over y (T, groups, rows, slices · H_pad), step by step."""
    T = len(y)
    _exchange_kernel[(exchange.programs, exchange.groups, 1)](
        y, arrived, error_flag(y.device), T, exchange.rows, wait_limit(T),
        H_PAD=plan.H_pad, BLOCK_H=plan.BLOCK_H, BLOCK_B=plan.BLOCK_B, BLOCK_K=plan.BLOCK_K,
        SPLIT_K=plan.SPLIT_K, SPIN=plan.spin, SLICES=exchange.slices, BARRIER=barrier,
        num_warps=plan.num_warps, launch_cooperative_grid=True, **compile_options(),
    )  # fmt: skip


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
