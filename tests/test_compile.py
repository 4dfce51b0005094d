"""The kernels, compiled for real targets: what became of U, of the waits, of the registers."""

import csv
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from perf import static
from perf.compiling import TARGETS, Compiled, compile_plan
from perf.sass import disassemble, find_loop, parse
from trigru.plan import LaunchPlan, plan_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PASSES = [(False, False), (False, True), (True, False), (True, True)]  # backward, textbook
STEPS_PER_PASS = 2  # of the time loop
# The shapes that matter most: no spills are allowed in these.
H100_BF16 = [
    (90, BF16, H, B, *which)
    for H, B in (
        (64, 16), (128, 16), (256, 16), (256, 64), (384, 16), (512, 16), (768, 16), (1024, 16),
        (2048, 16),
    )
    for which in PASSES
] + [
    (90, BF16, H, B, *which)
    for H, B in ((128, 4096), (256, 4096), (512, 256), (512, 4096))
    for which in PASSES[::2]
]  # fmt: skip
ELSEWHERE = [
    (sm, dtype, H, 16, *which)
    for sm in TARGETS
    for dtype, H in ((BF16, 768), (FP16, 60), (FP32, 256))
    for which in (PASSES[0], PASSES[3])
    if dtype != FP16 or sm in (80, 90)  # what sm_80 has is all that the others use
]


# The most that a step of the whole batch may take on an H100, forward and backward, in µs as the
# model has them (perf/NOTES.md).
GOALS = {
    ("torch", 128, 16): (0.60, 0.67),
    ("torch", 128, 1024): (0.60, 0.67),
    ("torch", 128, 4096): (1.7, 1.6),
    ("torch", 256, 16): (0.80, 0.85),
    ("torch", 256, 64): (0.80, 0.85),
    ("torch", 256, 1024): (2.0, 2.7),
    ("torch", 256, 4096): (5.5, 8.0),
    ("torch", 512, 16): (0.80, 1.0),
    ("torch", 512, 256): (2.0, 3.5),
    ("torch", 512, 4096): (16.0, 25.0),
    ("torch", 768, 16): (0.95, 1.4),
    ("torch", 1024, 16): (1.05, 1.35),
    ("textbook", 512, 16): (1.5, 1.5),
}
TABLE = Path(__file__).parents[1] / "perf" / "static.csv"


class Kernel(NamedTuple):
    plan: LaunchPlan
    compiled: Compiled
    backward: bool
    textbook: bool

    @property
    def waits(self):
        """Of a step, those that all else waits for: of how many tiles of H values each."""
        if self.plan.solo:
            return ()
        if self.textbook:
            return (1, 2) if self.backward else (1, 1)
        return (3,) if self.backward else (1,)

    def in_loop(self):
        """How often each opcode is in the time loop, for each of its steps."""
        loop = find_loop(*parse(disassemble(self.compiled.cubin)))
        names = Counter(loop.instructions[k].name for k in loop.span())
        return Counter({name: n / STEPS_PER_PASS for name, n in names.items()})


def name(value):
    return str(value).removeprefix("torch.")


def build(sm, dtype, H, B, backward, textbook, **options):
    plan = plan_launch(
        TARGETS[sm], B=B, H=H, D=1, itemsize=dtype.itemsize, backward=backward, textbook=textbook
    )
    compiled = compile_plan(sm, plan, dtype, backward=backward, textbook=textbook, **options)
    return Kernel(plan, compiled, backward, textbook)


def check(kernel, spills=0):
    plan, compiled = kernel.plan, kernel.compiled
    assert compiled.shared_bytes <= plan.shared_bytes
    # The loop and the odd last step after it: in each, one poll, one for what has not arrived where
    # that is many vectors, and at most one loading ahead. Every load moves 16 bytes a thread, from
    # L2, and nothing else is polled but the flag.
    strong = re.findall(r"ld\.(?:relaxed|volatile|acquire)\.\S+", compiled.ptx)
    polls = [load for load in strong if ".sys." not in load]
    assert set(polls) == ({"ld.relaxed.gpu.global.v4.b32"} if kernel.waits else set())
    threads = 32 * plan.num_warps
    of_tile = plan.H_pad * plan.BLOCK_B * plan.bits // 128 // threads
    vectors = sum(of_tile * tiles for tiles in kernel.waits)
    if not plan.stages:
        vectors += sum(of_tile * tiles for tiles in kernel.waits if of_tile * tiles >= 8)
    bodies = STEPS_PER_PASS + 1
    begun = len(polls) - bodies * vectors  # chunks that are loaded before they are tested
    assert begun == 0 if not plan.stages else 0 <= begun < bodies * vectors
    # No barrier but that between the parts of a sum and the sum, or between a state and its use.
    in_loop = kernel.in_loop()
    if not plan.stages:
        assert in_loop["BAR"] == (2 if kernel.textbook else 1)
    assert in_loop["LDL"] + in_loop["STL"] <= spills, f"{compiled.registers} registers"


@pytest.mark.parametrize(("sm", "dtype", "H", "B", "backward", "textbook"), H100_BF16, ids=name)
def test_without_spills(sm, dtype, H, B, backward, textbook):
    check(build(sm, dtype, H, B, backward, textbook))


@pytest.mark.parametrize(("sm", "dtype", "H", "B", "backward", "textbook"), ELSEWHERE, ids=name)
def test_elsewhere(sm, dtype, H, B, backward, textbook):
    check(build(sm, dtype, H, B, backward, textbook), spills=4)


@pytest.mark.parametrize("H", [64, 256], ids=["solo", "group"])
@pytest.mark.parametrize(("backward", "textbook"), PASSES[::3])
def test_float32_products(backward, textbook, H):
    """By tensor cores either way: TF32's operands are rounded, which the hardware would not do;
    exact ones take three products for one."""
    tf32 = build(90, FP32, H, 16, backward, textbook)
    exact = build(90, FP32, H, 16, backward, textbook, tf32=False)
    products = [k.compiled.ptx.count("mma.sync.aligned.m16n8k8") for k in (tf32, exact)]
    assert 0 < 3 * products[0] == products[1]
    for kernel in (tf32, exact):
        assert "cvt.rna.tf32.f32" in kernel.compiled.ptx


@pytest.mark.parametrize("H", [60, 256, 512, 1024])
@pytest.mark.parametrize(("backward", "textbook"), PASSES)
def test_packed(backward, textbook, H):
    check(build(90, BF16, H, 64, backward, textbook, packed=True), spills=4)


def test_a_layer_of_two_directions():
    plan = plan_launch(TARGETS[90], B=16, H=512, D=2, itemsize=2, backward=False, textbook=False)
    assert plan.directions == 2
    compiled = compile_plan(90, plan, BF16, backward=False, textbook=False)
    check(Kernel(plan, compiled, backward=False, textbook=False))


@pytest.fixture(scope="module")
def table():
    """perf/static.csv, by the fields of perf.static.Kernel."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        static.Kernel(
            int(r["sm"]),
            r["variant"],
            r["pass"] == "backward",
            int(r["H"]),
            int(r["B"]),
            bool(int(r["resets"])),
        ): r
        for r in rows
    }


def test_the_table_of_estimates_meets_its_goals(table):
    assert set(table) == set(static.kernels())
    for (variant, H, B), goals in GOALS.items():
        for backward, goal in enumerate(goals):
            row = table[90, variant, bool(backward), H, B, False]
            assert float(row["us_per_step"]) <= goal and not float(row["spills"]), row


@pytest.mark.parametrize(
    "kernel",
    [
        (90, "torch", False, 128, 16, False),
        (90, "torch", True, 1024, 16, False),
        (90, "textbook", True, 512, 16, False),
        (90, "torch", False, 512, 16, True),
    ],
    ids=str,
)
def test_the_table_of_estimates_is_of_these_kernels(table, kernel):
    """Of the cheap ones. If not: `python -m perf static`."""
    row = static.row_of(static.Kernel(*kernel))
    for column in ("regime", "rows", "warps", "clocks", "registers", "barriers"):
        assert table[kernel][column] == str(row[column]), column
