"""Floors: the numbers from a file, and the kernels that measure what a step costs at least."""

import csv
import math
import re
import tempfile
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import triton
from emulator import Emulator, why_not
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from perf import floor_kernels, floors
from perf.compiling import ELEMENT, TARGETS, run_tool
from perf.floor_kernels import run_floors
from perf.floors import COLUMNS, Exchange, Floors
from perf.measure import FACTS, append_row
from perf.shapes import SETS, Case
from trigru import launch
from trigru.exchange import unwritten
from trigru.plan import LaunchPlan, NoPlan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
H100 = TARGETS[90]
BARRIER = pytest.mark.parametrize("barrier", [False, True], ids=["exchange", "barrier"])
EMULATED = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
SLICES = pytest.mark.parametrize("slices", [1, 3])

GROUP = Case("torch", "bf16", T=100, B=16, I=256, H=512)
SOLO = Case("torch", "bf16", T=100, B=16, I=64, H=64)


def make_plan(
    H, D=1, *, regime="latency", bits=16, BLOCK_H=16, BLOCK_B=16, warps=8, chunks=2, u_shared=0,
    wgmma=False, rows=16, batch_programs=8,
):  # fmt: skip
    """A plan with the structure of a real one."""
    H_pad = BLOCK_H if regime == "solo" else -(-H // 256) * 256
    return LaunchPlan(
        H=H, D=D, bits=bits, H_pad=H_pad, BLOCK_H=BLOCK_H, BLOCK_B=BLOCK_B, num_warps=warps,
        shared_bytes=0, solo=regime == "solo", split=regime == "latency", chunks=chunks,
        stages=2 * (regime == "throughput"), u_shared=u_shared, wgmma=wgmma, rows=rows,
        directions=D, batch_programs=batch_programs,
    )  # fmt: skip


def plans(limits, *, B, H, D, itemsize, backward, textbook, exact):
    """Stands in for plan_launch, whose choice may change: programs of 16 units forward, half of
    whose U is in shared memory, and of 32 backward, with all of it there."""
    if H > 2048:
        raise NoPlan("too large")
    rows = min(B, 16)
    if H <= 128:
        u_shared = int(H > 32)
        return make_plan(H, D, regime="solo", BLOCK_H=H, chunks=1, u_shared=u_shared, rows=rows)
    if backward:
        return make_plan(
            H, D, regime="throughput", BLOCK_H=32, warps=4, chunks=4, u_shared=4, rows=rows,
            batch_programs=2,
        )  # fmt: skip
    return make_plan(H, D, u_shared=1, rows=rows, batch_programs=2)


@pytest.fixture
def known_plans(monkeypatch):
    monkeypatch.setattr(floors, "plan_launch", plans)


# What a case must take

FORWARD = Exchange("bf16", 32, 1, 16, "latency", False, 16, 16, 8, 512, 2, slices=1, turns=1)
BACKWARD = Exchange("bf16", 16, 1, 16, "throughput", False, 32, 16, 4, 512, 4, slices=3, turns=1)
FAST = {  # no term is over 1 µs, but for that of the launch
    ("graph", ""): 1.0,
    ("bandwidth", ""): 1e6,
    ("matmul", "bf16"): 1e6,
    ("matmul", "fp32"): 1e6,
    ("matmul", "tf32"): 1e6,
    ("clock", ""): 1e6,
    FORWARD: 1e-3,
    BACKWARD: 1e-3,
}


def write(path, measured, device="toy", name="exchange"):
    """What was measured, as run_floors writes it: the fast end of each interval counts."""
    for key, value in measured.items():
        if isinstance(key, Exchange):
            what = key._asdict() | {"name": name}
        else:
            what = dict.fromkeys(Exchange._fields) | {"name": key[0], "dtype": key[1]}
        short = what["name"] in ("graph", name)
        row = (
            dict.fromkeys(COLUMNS) | what | {"device": device, "unit": "us" if short else "a rate"}
        )
        row |= {"p20": -1, "p50": -1, "p80": -1, "p20" if short else "p80": value}
        append_row(path, COLUMNS, row)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def floor(known_plans, tmp_path):
    """The floor by what was measured, otherwise than FAST."""

    def floor(case, mode, slow=None, without=()):
        path = tmp_path / "floors.csv"
        path.unlink(missing_ok=True)
        write(path, {k: v for k, v in (FAST | (slow or {})).items() if k not in without})
        return Floors.read(path, "toy").of(case, mode, H100)

    return floor


# By hand. GROUP has 100·16·(256 + 512) elements of x and y, 2·16·512 of h0 and h_n and
# 3·512·(256 + 512 + 2) of weights, of 2 bytes; one of 132 SMs has 2·3·16·512·16 FLOPs a step, and
# half of 3·16·512·2/128 clocks for U in a step forward, twice and four times that backward.
SLOW = {
    "launch": ({("graph", ""): 7}, 7, 7),
    "bytes": ({("bandwidth", ""): 1}, 4855.808, 2 * 4855.808),
    "products": ({("matmul", "bf16"): 1}, 100 * 103.809024, 3 * 100 * 103.809024),
    "U": ({("clock", ""): 1}, 100 * 192, 100 * 192 + 100 * 768),
    "exchange": ({FORWARD: 2}, 200, 200 + 100 * 0.001),
    "exchange back": ({BACKWARD: 5}, 1, 500 + 100 * 0.001),
}


@pytest.mark.parametrize("slow", SLOW)
def test_a_group(floor, slow):
    measured, forward, training = SLOW[slow]
    assert floor(GROUP, "forward", measured) == pytest.approx(forward, rel=1e-9)
    assert floor(GROUP, "training", measured) == pytest.approx(training, rel=1e-9)


def test_a_step_takes_the_longer_of_its_parts(floor):
    slow = {("clock", ""): 192.0}  # U in 1 µs forward, 4 backward
    assert floor(GROUP, "forward", slow | {FORWARD: 0.9}) == pytest.approx(100)
    assert floor(GROUP, "forward", slow | {FORWARD: 1.5}) == pytest.approx(150)
    assert floor(GROUP, "training", slow | {FORWARD: 1.5, BACKWARD: 1.5}) == pytest.approx(550)
    assert floor(GROUP, "training", slow | {FORWARD: 1.5, BACKWARD: 4.5}) == pytest.approx(600)
    slow |= {("matmul", "bf16"): 103.809024 / 5}  # products in 5 µs, 10 backward
    assert floor(GROUP, "training", slow | {FORWARD: 1.5, BACKWARD: 4.5}) == pytest.approx(1500)
    assert floor(GROUP._replace(packed=True), "forward", slow) is None


def test_flops_of_the_whole_device(floor):
    """Of the input projections, which no step has, and the recurrent products, 2·100·16·3·512·I."""
    slow = {("matmul", "bf16"): 1}
    for mode, more in (("forward", 1), ("training", 3)):
        done = 2 * 100 * 16 * 3 * 512 * (8192 + 512)
        assert floor(GROUP._replace(I=8192), mode, slow) == pytest.approx(more * done / 1e6)


def test_layers_and_directions(floor):
    """A layer more is a step more, and has the size of both directions for its input."""
    case = GROUP._replace(layers=2, directions=2)
    slow = {FORWARD._replace(groups=2): 2, BACKWARD._replace(groups=2): 5}
    assert floor(case, "forward", slow) == pytest.approx(101 * 2)
    assert floor(case, "training", slow) == pytest.approx(101 * 7)
    # x and y, h0 and h_n, the weights of both layers
    elements = 1600 * (256 + 1024) + 2 * 4 * 16 * 512
    elements += 2 * 1536 * (256 + 512 + 2) + 2 * 1536 * (1024 + 512 + 2)
    moved = floor(case, "forward", slow | {("bandwidth", ""): 1})
    assert moved == pytest.approx(2 * elements / 1e3)
    # 2 directions, with products of I + H and 2H + H
    done = 2 * 2 * 1600 * 1536 * ((256 + 512) + (1024 + 512))
    assert floor(case, "training", slow | {("matmul", "bf16"): 1}) == pytest.approx(3 * done / 1e6)


def test_textbook(floor):
    """One bias less; two turns, in both passes; one slice in each."""
    case = GROUP._replace(variant="textbook")
    two = {FORWARD._replace(turns=2): 2, BACKWARD._replace(slices=1, turns=2): 3}
    assert floor(case, "forward") is None
    assert floor(case, "training", two) == pytest.approx(500)
    moved = floor(case, "forward", two | {("bandwidth", ""): 1})
    assert moved == pytest.approx(4855.808 - 2 * 3 * 512 / 1e3)


def test_solo_needs_no_exchange(floor):
    exchanges = (FORWARD, BACKWARD)
    slow = {("clock", ""): 192.0}  # 3·64·64·2/128 for U in a step, where it is in shared memory
    assert floor(SOLO, "forward", slow, without=exchanges) == pytest.approx(100)
    assert floor(SOLO, "training", slow, without=exchanges) == pytest.approx(200)
    small = SOLO._replace(H=32, I=32)
    assert floor(small, "training", slow, without=exchanges) == FAST["graph", ""]
    slow = {("matmul", "bf16"): 2 * 3 * 32 * 32 * 16 * 132 / 1e6}
    assert floor(small, "training", slow, without=exchanges) == pytest.approx(200)


def test_batch_tiles_that_follow_in_a_launch_count_once(floor):
    slow = {FORWARD._replace(groups=2): 2}
    for B in (32, 33, 320):
        assert floor(GROUP._replace(B=B), "forward", slow) == pytest.approx(200)


def test_rows_that_a_tile_lacks_are_not_exchanged(floor):
    slow = {FORWARD._replace(rows=3): 2}
    assert floor(GROUP._replace(B=3), "forward", slow) == pytest.approx(200)


def test_without_a_plan_the_rest_counts(floor):
    case = GROUP._replace(H=4096, I=4096, B=1, T=1)
    without = (("clock", ""), FORWARD, BACKWARD)
    assert floor(case, "training", {("graph", ""): 500}, without) == 500
    done = 3 * 2 * 3 * 4096 * 2 * 4096
    slow = {("matmul", "bf16"): 1e-3}
    assert floor(case, "training", slow, without) == pytest.approx(done / 1e3)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_float32_products_are_those_of_the_rnns(floor, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    case = GROUP._replace(dtype="fp32")
    slow = {("matmul", "fp32"): 1, ("matmul", "tf32"): 2, FORWARD._replace(dtype="fp32"): 1e-3}
    floor_in_full = 100 * 103.809024
    expected = floor_in_full if precision == "ieee" else floor_in_full / 2
    assert floor(case, "forward", slow) == pytest.approx(expected)
    assert floor(case._replace(dtype="tf32"), "forward", slow) == pytest.approx(floor_in_full / 2)
    # The kernels' float32 products are three of TF32.
    faster = floor(case, "forward", slow | {("matmul", "tf32"): 6})
    assert faster == pytest.approx(floor_in_full / (2 if precision == "ieee" else 6))
    assert floor(case, "forward", slow | {("clock", ""): 1}) == pytest.approx(100 * 2 * 192)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("missing", FAST, ids=str)
def test_nothing_is_said_without_all_that_was_needed(floor, missing, mode):
    not_needed = [("matmul", "fp32"), ("matmul", "tf32")] + [BACKWARD] * (mode == "forward")
    assert (floor(GROUP, mode, without=[missing]) is None) == (missing not in not_needed)


def test_a_barrier_is_no_exchange(known_plans, tmp_path):
    write(tmp_path / "f.csv", {k: v for k, v in FAST.items() if k is not FORWARD})
    write(tmp_path / "f.csv", {FORWARD: 1.0}, name="barrier")
    assert Floors.read(tmp_path / "f.csv", "toy").of(GROUP, "forward", H100) is None


def test_the_last_row_of_the_device_counts(known_plans, tmp_path):
    path = tmp_path / "floors.csv"
    assert Floors.read(path, "toy") is None
    write(path, FAST | {("graph", ""): 10})
    write(path, {("graph", ""): 20})
    write(path, {("graph", ""): 30}, device="other")
    assert Floors.read(path, "toy").of(GROUP, "forward", H100) == 20
    assert Floors.read(path, "other").of(GROUP, "forward", H100) is None
    assert Floors.read(path, "a third") is None


# What is measured


def test_a_cpu_has_no_floors(tmp_path):
    with pytest.raises(ValueError, match="CUDA device, not on cpu"):
        run_floors([GROUP], CPU, tmp_path / "floors.csv")
    assert not (tmp_path / "floors.csv").exists()


def test_exchanges_are_the_distinct_ones_of_both_passes(known_plans):
    wide = GROUP._replace(dtype="fp32", B=33)
    cases = [
        GROUP, GROUP._replace(dtype="fp16"), GROUP._replace(T=7, I=9, layers=3), SOLO,
        GROUP._replace(B=1), GROUP._replace(H=300, directions=2), wide, wide._replace(B=1000),
        GROUP._replace(variant="textbook"), GROUP._replace(H=4096),
    ]  # fmt: skip
    assert set(floors.exchanges(cases, H100)) == {
        FORWARD,
        BACKWARD,
        FORWARD._replace(rows=1),
        BACKWARD._replace(rows=1),
        FORWARD._replace(programs=19, groups=2),
        BACKWARD._replace(programs=10, groups=2),
        FORWARD._replace(dtype="fp32", groups=2),
        BACKWARD._replace(dtype="fp32", groups=2),
        FORWARD._replace(turns=2),
        BACKWARD._replace(slices=1, turns=2),
    }
    # Packed, where fewer and fewer rows run, nothing bounds a step from below.
    assert not floors.exchanges([GROUP._replace(packed=True)], H100)
    more = floors.exchanges([GROUP._replace(H=600)], H100)
    assert set(more) == {
        FORWARD._replace(programs=38, H_pad=768),
        BACKWARD._replace(programs=19, H_pad=768),
    }


def test_plans_are_those_of_the_library(monkeypatch):
    monkeypatch.setattr(floors, "plan_launch", lambda limits, **shape: (limits, shape))
    case = GROUP._replace(B=7, directions=2)
    shape = dict(B=7, H=512, D=2, itemsize=2, backward=False, textbook=False, exact=False)
    assert floors.plan_of(case, False, H100) == (H100, shape)
    shape |= dict(itemsize=4, backward=True, textbook=True)
    for precision, dtype, exact in (
        ("tf32", "fp32", False), ("ieee", "fp32", True), ("ieee", "tf32", False),
    ):  # fmt: skip
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        case = case._replace(variant="textbook", dtype=dtype)
        assert floors.plan_of(case, True, H100) == (H100, shape | {"exact": exact})


@pytest.mark.parametrize("sm", TARGETS)
def test_real_exchanges_run_at_once_and_fit_into_memory(sm):
    limits = TARGETS[sm]
    for exchange, plan in floors.exchanges(list(SETS["core"]()), limits).items():
        assert exchange.programs * exchange.groups <= limits.sm_count
        assert 0 < plan.H <= exchange.programs * exchange.BLOCK_H <= exchange.H_pad
        assert not plan.solo and floor_kernels.form_of(plan).H_PAD == exchange.H_pad
        row = exchange.slices * exchange.H_pad * (4 if exchange.dtype == "fp32" else 2)
        step = exchange.turns * exchange.groups * exchange.rows * row
        assert step * floor_kernels.LEAST_STEPS < 2**28


class FakeClock:
    """Runs the calls as the real clocks do; the n-th of all takes n² µs."""

    def __init__(self):
        self.ran = 0

    def __call__(self, calls):
        times = []
        for call in calls:
            call()
            self.ran += 1
            times.append(float(self.ran**2))
        return times


@pytest.mark.parametrize("turns", [1, 2])
@BARRIER
def test_a_step_is_the_difference_of_a_long_launch_and_a_short_one(monkeypatch, barrier, turns):
    """Each launch finds that nothing has arrived, and nobody; what it leaves are other bits."""
    launched = []
    exchange = FORWARD._replace(programs=31, groups=3, rows=5, slices=3, turns=turns)

    def exchange_alone(y, arrived, *rest):
        launched.append(tuple(y.shape))
        bits = y.view(torch.int16)
        assert y.dtype == BF16 and (bits[..., :496] == -1).all() and not bits[..., 496:].any()
        assert arrived.dtype == torch.int32 and arrived.shape == (3, 32) and not arrived.any()
        assert rest == (exchange, "the plan", barrier)
        y.fill_(2)
        arrived += 1

    monkeypatch.setattr(floor_kernels, "exchange_alone", exchange_alone)
    monkeypatch.setattr(floor_kernels, "MOST_STEPS", 10)
    monkeypatch.setattr(floor_kernels, "LEAST_STEPS", 10)
    got = floor_kernels.measure_exchange(exchange, "the plan", CPU, FakeClock(), barrier=barrier)
    assert launched == [(2 * turns, 3, 5, 3, 512), (10 * turns, 3, 5, 3, 512)] * (1 + 3 + 9)
    # The n-th round calls: reset, short, reset, long.
    assert got == [((4 * n + 4) ** 2 - (4 * n + 2) ** 2) / 8 for n in range(3, 12)]


@pytest.mark.parametrize(
    "groups, rows, slices, steps", [(1, 1, 1, 1000), (4, 16, 1, 256), (64, 16, 3, 50)]
)
def test_l2_holds_what_is_exchanged(monkeypatch, groups, rows, slices, steps):
    lengths = set()
    monkeypatch.setattr(floor_kernels, "exchange_alone", lambda y, *_: lengths.add(len(y)))
    exchange = FORWARD._replace(groups=groups, rows=rows, slices=slices)  # of H = 512, 2 bytes
    floor_kernels.measure_exchange(exchange, "the plan", CPU, FakeClock())
    assert lengths == {steps, steps // 5}


@pytest.mark.parametrize("later", [0, 20])
def test_a_launch_that_gave_up_is_no_measurement(monkeypatch, later):
    clock = FakeClock()

    def exchange_alone(y, *_):
        if clock.ran >= later:
            launch.error_flag(y.device).fill_(1)

    monkeypatch.setattr(floor_kernels, "exchange_alone", exchange_alone)
    with pytest.raises(launch.ExchangeTimeout):
        floor_kernels.measure_exchange(FORWARD, "the plan", CPU, clock)
    assert (clock.ran == 0) == (later == 0)  # no more launches that would wait as long


def test_a_launch_is_cooperative(monkeypatch):
    """An exchange whose programs cannot all run at once must be refused: it would hang."""
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.update(kwargs, grid=grid, args=args)

    monkeypatch.setattr(floor_kernels, "_exchange_kernel", Kernel())
    plan = make_plan(500, u_shared=1)
    y = torch.empty(70, 1)
    floor_kernels.exchange_alone(y, "counters", FORWARD._replace(groups=3, slices=3), plan, True)
    assert launched.pop("args") == (
        y, "counters", launch.error_flag(CPU), 70, 16, launch.WAIT_POLLS
    )  # fmt: skip
    assert launched == {
        "grid": (32, 3, 1), "FORM": floor_kernels.form_of(plan), "SLICES": 3, "BARRIER": True,
        "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True, "launch_cooperative_grid": True,
    }  # fmt: skip


def test_what_does_not_matter_for_an_exchange_is_not_compiled_in():
    """Its form is that of the library's kernel, but for the units of H and where U is."""
    plan = make_plan(500, u_shared=1)
    form = floor_kernels.form_of(plan)
    assert form == floor_kernels.form_of(make_plan(512, D=2, rows=3, batch_programs=1))
    own = launch.compile_time(plan, exact=False)["FORM"]
    assert form == replace(own, H=512, U_SHARED=2)


def test_constants_from_times(monkeypatch):
    """On a CPU, with nothing done: every call takes 1 ms."""
    products, before = [], torch.backends.cuda.matmul.fp32_precision

    class Spin:
        def __getitem__(self, grid):
            return lambda spent, nanoseconds, num_warps: spent.copy_(
                torch.tensor([nanoseconds, nanoseconds * 3 // 2])
            )

    class Empty:
        def __getitem__(self, grid):
            return lambda *args, num_warps: None

    def randn(*shape, dtype, device):
        products.append((shape, dtype, set()))
        return torch.empty(2, 1)

    def mm(a, b):
        products[-1][2].add(torch.backends.cuda.matmul.fp32_precision)

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4096, 9999))
    monkeypatch.setattr(floor_kernels, "_spin_kernel", Spin())
    monkeypatch.setattr(floor_kernels, "_empty_kernel", Empty())
    monkeypatch.setattr(floor_kernels, "captured", lambda call: call)

    def clock(calls):
        for call in calls:
            call()
        return [1000.0] * len(calls)

    found = {
        (name, dtype): (*set(values), unit)
        for name, dtype, values, unit in floor_kernels.measure_constants(CPU, clock)
    }
    large = pytest.approx(2 * 8.192**3)  # 2 n³ FLOPs in 1 ms, in 10¹² a second
    assert found == {
        ("bandwidth", ""): (pytest.approx(2048e-6), "GB/s"),
        ("matmul", "bf16"): (large, "TFLOP/s"),
        ("matmul", "fp16"): (large, "TFLOP/s"),
        ("matmul", "fp32"): (pytest.approx(2 * 4.096**3), "TFLOP/s"),
        ("matmul", "tf32"): (large, "TFLOP/s"),
        ("clock", ""): (1500.0, "MHz"),
        ("launch", ""): (10.0, "us"),
        ("graph", ""): (1000.0, "us"),
    }
    assert products == [
        ((2, 8192, 8192), BF16, {"ieee"}),
        ((2, 8192, 8192), FP16, {"ieee"}),
        ((2, 4096, 4096), FP32, {"ieee"}),
        ((2, 8192, 8192), FP32, {"tf32"}),
    ]
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_what_is_written_is_what_floors_need(known_plans, monkeypatch, tmp_path):
    """run_floors without a device: the measurements are made up, all else is real."""
    path, cases = tmp_path / "floors.csv", [GROUP, SOLO, GROUP._replace(variant="textbook")]
    constants = [
        (*key, [value] * 2, "us" if key[0] == "graph" else "a rate")
        for key, value in FAST.items()
        if len(key) == 2
    ]
    times = {False: iter(range(1, 9)), True: iter(range(100, 109))}
    for name, value in {
        "facts": lambda device: dict.fromkeys(FACTS[:-1], "toy"),
        "device_limits": lambda device: H100,
        "measure_constants": lambda device, clock: iter(constants),
        "measure_exchange": lambda *_, barrier=False: [next(times[barrier])] * 2,
    }.items():
        monkeypatch.setattr(floor_kernels, name, value)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    run_floors(cases, CUDA, path, clock=FakeClock())
    found = Floors.read(path, "toy")
    # In the order of the cases, both passes of each; a barrier only where slices = turns = 1
    assert found.of(GROUP, "forward", H100) == 100 * 1
    assert found.of(GROUP, "training", H100) == 100 * (1 + 2)
    assert found.of(cases[2], "training", H100) == 100 * (3 + 4)
    rows = read(path)[len(constants) :]
    assert [row["name"] for row in rows] == ["exchange", "barrier"] + ["exchange"] * 3
    assert ",".join(list(rows[1].values())[FACTS.index("date") + 1 :]) == (
        "barrier,bf16,32,1,16,latency,False,16,16,8,512,2,1,1,100.0,100.0,100.0,us"
    )
    assert all(row["sm"] == "toy" and row["date"] for row in rows)


def test_an_exchange_that_gave_up_costs_the_others_nothing(known_plans, monkeypatch, tmp_path):
    def measure_exchange(exchange, *_, barrier):
        if exchange.slices == 3:
            raise launch.ExchangeTimeout("gave up")
        return [1.0, 1.0]

    for name, value in {
        "facts": lambda device: dict.fromkeys(FACTS[:-1], "toy"),
        "device_limits": lambda device: H100,
        "measure_constants": lambda device, clock: iter(()),
        "measure_exchange": measure_exchange,
    }.items():
        monkeypatch.setattr(floor_kernels, name, value)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    cases = [GROUP, GROUP._replace(variant="textbook")]
    assert not run_floors(cases, CUDA, tmp_path / "floors.csv", clock=FakeClock())
    assert [row["name"] for row in read(tmp_path / "floors.csv")] == [
        "exchange", "barrier", "exchange", "exchange",
    ]  # fmt: skip
    assert run_floors(cases[1:], CUDA, tmp_path / "floors.csv", clock=FakeClock())


# The kernels, executed

T, GROUPS, PROGRAMS, ROWS = 5, 2, 3, 3
LATENCY = LaunchPlan(
    H=48, D=1, bits=32, H_pad=64, BLOCK_H=16, BLOCK_B=8, num_warps=4, shared_bytes=0, split=True,
    rows=ROWS,
)  # fmt: skip
LARGE = replace(LATENCY, H=1024, H_pad=1024, num_warps=8, chunks=4)
TWO_CHUNKS = replace(LATENCY, bits=16, H_pad=128, BLOCK_B=16, num_warps=2, chunks=2, newer=False)
STAGED = LaunchPlan(
    H=192, D=1, bits=16, H_pad=256, BLOCK_H=64, BLOCK_B=16, num_warps=4, shared_bytes=0, chunks=4,
    stages=2, u_shared=4, rows=ROWS,
)  # fmt: skip
WGMMA = replace(STAGED, wgmma=True)
WIDE = replace(STAGED, H=96, bits=32, H_pad=128, BLOCK_H=32, BLOCK_B=32)


def exact(y, BLOCK_B, units):
    """What the kernel stores into y [T, groups, rows, slices, H_pad]: a unit's own number, counted
    through all rows and groups, and one more for each tile; and 0 in the padding."""
    t, group, row, s, h = torch.meshgrid(*map(torch.arange, y.shape), indexing="ij")
    numbers = (group * BLOCK_B + row) * y.shape[-1] + h + t * y.shape[-2] + s
    return numbers.where(h < units, 0)


def hand_over(dtype, slices, plan, emulator, *, barrier):
    """Run the kernel over T steps: y [T, GROUPS, ROWS, slices, H_pad], and what it has to be."""
    y = unwritten(T, GROUPS, ROWS, slices, plan.H_pad, H=plan.H, like=torch.empty(0, dtype=dtype))
    exchange = Exchange(
        "", PROGRAMS, GROUPS, ROWS, plan.regime, plan.wgmma, plan.BLOCK_H, plan.BLOCK_B,
        plan.num_warps, plan.H_pad, plan.chunks, slices, 1,
    )  # fmt: skip
    arrived = torch.zeros(GROUPS, 32, dtype=torch.int32)
    with emulator:
        floor_kernels.exchange_alone(y, arrived, exchange, plan, barrier)
    launch.raise_if_failed(y.device)
    assert arrived[:, 0].tolist() == [PROGRAMS * T * barrier] * GROUPS
    return y, exact(y, plan.BLOCK_B, plan.H)


def exchange_emulator(**how):
    return Emulator(kernels=((floor_kernels, "_exchange_kernel"),), timed="y_ptr", **how)


@EMULATED
@BARRIER
@SLICES
@pytest.mark.parametrize(
    ("sm", "dtype", "plan"),
    [
        pytest.param(90, FP32, LATENCY, id="latency, fp32"),
        pytest.param(80, FP16, TWO_CHUNKS, id="latency, two chunks"),
        pytest.param(90, BF16, STAGED, id="throughput"),
        pytest.param(90, BF16, WGMMA, id="throughput, wgmma"),
        pytest.param(80, FP32, replace(WIDE, newer=False), id="throughput, fp32"),
    ],
)
def test_right_values_are_handed_over(sm, dtype, plan, slices, barrier):
    for seed in range(4):
        emulator = exchange_emulator(sm=sm, seed=seed)
        y, right = hand_over(dtype, slices, plan, emulator, barrier=barrier)
        assert not emulator.faults and torch.equal(y, right.to(dtype))
        # No program of a group begins a step before all of the step before was stored.
        turns = emulator.stored_at[..., : plan.H].transpose(0, 1).flatten(2)
        assert (turns[:, 1:].amin(2) > turns[:, :-1].amax(2)).all()


def look_once(ptx):
    """Waits that take what they find: the first jump out of each is always taken."""
    return re.sub(r"@p bra DONE;(?=\nadd.u32 i, i, 1;\nand)", "bra DONE;", ptx)


@EMULATED
@BARRIER
def test_at_a_barrier_there_is_nothing_left_to_be_awaited(barrier):
    """Without waits, programs keep together by the barrier alone."""
    together = []
    for seed in range(4):
        emulator = exchange_emulator(seed=seed, mutate=look_once)
        hand_over(FP32, 1, LATENCY, emulator, barrier=barrier)
        turns = emulator.stored_at[..., : LATENCY.H].transpose(0, 1).flatten(2)
        together += (turns[:, 1:].amin(2) > turns[:, :-1].amax(2)).flatten().tolist()
    assert all(together) == barrier


@EMULATED
@BARRIER
@pytest.mark.parametrize(
    ("dtype", "plan"), [(FP32, LATENCY), (BF16, STAGED)], ids=["latency", "throughput"]
)
def test_missing_program_is_reported(dtype, plan, barrier):
    emulator = exchange_emulator(missing=PROGRAMS + 2)
    with pytest.raises(launch.ExchangeTimeout):
        hand_over(dtype, 1, plan, emulator, barrier=barrier)
    assert [fault for fault in emulator.faults if "x no progress: " not in fault] == []


# The kernels, compiled


def compiled(kernel, sm, types, constants, num_warps):
    """The PTX and the SASS, and each of its loops: the lines from the jump's target to the jump."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    pointers = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    make_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make_source(kernel, signature, constants, pointers)
    options = {"num_warps": num_warps, **launch.compile_options()}
    asm = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        sass = run_tool("nvdisasm", "-c", cubin.name)
    lines, labels, loops = sass.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = i
        jump = re.search(r"BRA.*`\((\.L\w+)\)", line)
        if jump and labels.get(jump[1], i) < i - 1:  # not the endless one behind the end
            loops.append("\n".join(lines[labels[jump[1]] : i + 1]))
    return asm["ptx"], sass, loops


def compiled_exchange(sm, dtype, plan, slices, barrier):
    types = {
        "y_ptr": "*" + ELEMENT[dtype], "arrived_ptr": "*i32", "error_ptr": "*i32", "T": "i32",
        "rows": "i32", "wait_limit": "i32",
    }  # fmt: skip
    form = floor_kernels.form_of(plan)
    constants = {"FORM": form, "SLICES": slices, "BARRIER": barrier}
    kernel = floor_kernels._exchange_kernel
    return form, *compiled(kernel, sm, types, constants, plan.num_warps)


def places(pattern, text):
    return [match.start() for match in re.finditer(pattern, text)]


@BARRIER
@SLICES
@pytest.mark.parametrize(
    ("sm", "dtype", "plan"),
    [
        pytest.param(90, FP32, LARGE, id="latency, fp32"),
        pytest.param(80, FP16, TWO_CHUNKS, id="latency, two chunks"),
        pytest.param(90, BF16, STAGED, id="throughput"),
        pytest.param(90, FP32, WIDE, id="throughput, fp32"),
    ],
)
def test_the_loop_is_stores_and_waits(sm, dtype, plan, slices, barrier):
    form, _, sass, loops = compiled_exchange(sm, dtype, plan, slices, barrier)
    assert not re.search(r"\b(HMMA|HGMMA|FFMA|LDS|STS)\b", sass)
    steps = max(loops, key=len)
    # ptxas aims at 32 registers, for which it spills one; not where it is polled.
    assert len(places(r"\b(LDL|STL)\b", steps)) <= 1
    tiles = slices * form.CHUNKS
    looks = places(r"LDG\.E\.128\.STRONG\.GPU\b", steps)
    # All tiles are polled at once, or each in a loop of its own; all of these but the first have
    # been begun before. Of many vectors the loop loads what is missing, after one look at all.
    # There is nothing of it outside of the time loop.
    polling = [loop for loop in loops if loop is not steps and "LDG.E.128.STRONG.GPU" in loop]
    at_once, waits, begun = (1, tiles, tiles - 1) if form.STAGES else (tiles, 1, 0)
    polled = [len(places(r"LDG\.E\.128\.STRONG\.GPU\b", loop)) for loop in polling]
    vectors = at_once * form.VECTORS
    assert polled == [vectors] * waits and not any("LDL" in loop for loop in polling)
    before = begun * form.VECTORS + (vectors if vectors >= 8 else 0)
    assert len(looks) == sum(polled) + before == len(places(r"LDG\.E\.128", sass))
    # Each can give up, and sees whether another one did.
    assert all(re.search(r"LDG\.E\.STRONG\.SYS\b", loop) for loop in polling)
    assert len(places(r"STG\.E\.STRONG\.SYS\b", sass)) == waits + barrier
    # The slices are stored before the first look, each element once, of 16 bits as pairs where a
    # thread has neighbours. No thread goes on to the next step's before all of its program have
    # seen all of the tile.
    stores = places(r"STG\.E(\.U16)?\.STRONG\.GPU\b", steps)
    of_thread = form.BLOCK_H * form.BLOCK_B // (32 * form.WARPS * (2 if form.PAIRS else 1))
    assert len(stores) == slices * max(1, of_thread)
    assert max(stores) < min(looks) and len(places(r"STG\.E.*\.GPU\b", sass)) == len(stores)
    barriers = places(r"BAR\.SYNC", steps)
    assert len([b for b in barriers if b > max(looks)]) == 1
    assert len(barriers) == (3 if barrier else 1)


@SLICES
@pytest.mark.parametrize("sm", [90, 80])
def test_a_barrier_releases_what_was_stored_and_acquires_what_is_loaded(sm, slices):
    _, ptx, _, _ = compiled_exchange(sm, FP32, LATENCY, slices, True)
    order = r"st\.relaxed\.gpu|bar\.sync|atom\S+|ld\.acquire\S+|ld\.relaxed\.gpu"
    found = re.findall(order, ptx)
    first_look = found.index("ld.relaxed.gpu")
    assert found[:first_look] == [
        *["st.relaxed.gpu"] * slices,
        "bar.sync",  # all threads have stored
        "atom.global.gpu.release.add.u32",
        "ld.acquire.gpu.global.b32",
        "bar.sync",  # and none loads before all have arrived
    ]
    assert set(found[first_look:-1]) == {"ld.relaxed.gpu"}
    assert found[-1] == "bar.sync"


@pytest.mark.parametrize("sm", [90, 80])
def test_both_clocks_are_read_around_the_spin(sm):
    types = {"spent_ptr": "*i64", "nanoseconds": "i32"}
    _, sass, loops = compiled(floor_kernels._spin_kernel, sm, types, {}, 1)
    (spin,) = loops
    read = re.findall(r"SR_(CLOCK|GLOBALTIMER)LO", sass)
    assert read[:2] == ["GLOBALTIMER", "CLOCK"] and read[-2:] == ["GLOBALTIMER", "CLOCK"]
    assert read.count("CLOCK") == 2
    assert re.findall(r"SR_(CLOCK|GLOBALTIMER)LO", spin) == ["GLOBALTIMER"]
    assert sass.rindex("SR_CLOCKLO") > sass.index(spin) + len(spin)


# On a device


@pytest.mark.gpu(compiled_ahead=False)
def test_floors_of_a_device(tmp_path):
    path, device = tmp_path / "floors.csv", torch.device("cuda", torch.cuda.current_device())
    cases = [GROUP._replace(I=512), GROUP._replace(H=256, dtype="fp32", variant="textbook")]
    assert run_floors(cases, device, path)
    names = {"bandwidth", "matmul", "clock", "launch", "graph", "exchange", "barrier"}
    assert {row["name"] for row in read(path)} == names
    for row in read(path):
        p20, p50, p80 = (float(row[p]) for p in ("p20", "p50", "p80"))
        assert 0 < p20 <= p50 <= p80 < math.inf, row
    found = Floors.read(path, torch.cuda.get_device_name(device))
    limits = floor_kernels.device_limits(device)
    for case in cases:
        assert 0 < found.of(case, "forward", limits) < found.of(case, "training", limits)


@pytest.mark.gpu
@BARRIER
@SLICES
def test_right_values_are_handed_over_on_a_device(slices, barrier):
    device = torch.device("cuda", torch.cuda.current_device())
    limits = floor_kernels.device_limits(device)
    plan = floors.plan_of(GROUP, slices == 3, limits)
    exchange = floors.exchange_of(plan, GROUP, slices == 3)
    units = exchange.programs * exchange.BLOCK_H
    shape = 50, exchange.groups, exchange.rows, slices, plan.H_pad
    y = torch.empty(shape, dtype=BF16, device=device)
    arrived = torch.empty(exchange.groups, 32, dtype=torch.int32, device=device)
    floor_kernels.reset(y, arrived, units)
    floor_kernels.exchange_alone(y, arrived, exchange, plan, barrier)
    torch.cuda.synchronize()
    launch.raise_if_failed(y.device)
    assert torch.equal(y.cpu(), exact(y, plan.BLOCK_B, units).float().to(BF16))
