"""The kernels, compiled for real targets: what became of U, of the waits, of the registers."""

import re

import pytest
import torch

from perf.compiling import TARGETS, compile_plan
from trigru.plan import plan_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PASSES = [(False, False), (False, True), (True, False), (True, True)]  # backward, textbook
# The shapes that matter most: no spills are allowed in these.
H100_BF16 = [
    (90, BF16, H, B, *which)
    for H in (128, 256, 512, 1024, 2048)
    for B in (16, 64)
    for which in PASSES
]
ELSEWHERE = [
    (sm, dtype, H, 16, *which)
    for sm in TARGETS
    for dtype, H in ((BF16, 768), (FP16, 60), (FP32, 256))
    for which in (PASSES[0], PASSES[3])
]


def name(value):
    return str(value).removeprefix("torch.")


def build(sm, dtype, H, B, backward, textbook, **options):
    plan = plan_launch(
        TARGETS[sm], B=B, H=H, D=1, itemsize=dtype.itemsize, backward=backward, textbook=textbook
    )
    compiled = compile_plan(sm, plan, dtype, backward=backward, textbook=textbook, **options)
    return plan, compiled


def depths(ttgir, operation):
    """How deep in loops each operation that the pattern matches stands."""
    lines = [line for line in ttgir.splitlines() if re.search(operation, line)]
    return [(len(line) - len(line.lstrip())) // 2 - 2 for line in lines]  # module and function


def check(plan, compiled, itemsize, backward, textbook):
    assert compiled.shared_bytes <= plan.shared_bytes
    # U: each of its tiles is loaded once, outside all loops, and kept in shared memory.
    u_tile = (plan.BLOCK_H, plan.BLOCK_K)
    if plan.SPLIT_K > 1:
        u_tile = (plan.SPLIT_K, plan.BLOCK_H, plan.BLOCK_K // plan.SPLIT_K)
    tiles = 3 * plan.H_pad // plan.BLOCK_K
    tile = "x".join(map(str, u_tile))
    loads = rf"= tt\.load (?!.*isVolatile).*: tensor<{tile}x!tt\.ptr<"
    assert depths(compiled.ttgir, loads) == [0] * tiles
    assert depths(compiled.ttgir, rf"= ttg\.local_alloc .*memdesc<{tile}x") == [0] * tiles
    # Waits: every poll moves 16 bytes a thread, and only polls and first tries are volatile.
    products = (3 if backward else 2 if textbook else 1) if not plan.solo else 0
    vectors = products * plan.H_pad // plan.BLOCK_K * plan.spin * itemsize // 16
    polls = re.findall(r"ld\.relaxed\.\S+", compiled.ptx)
    assert polls == ["ld.relaxed.gpu.global.v4.b32"] * vectors
    first_tries = re.findall(r"ld\.volatile\.\S+", compiled.ptx)
    assert first_tries == ["ld.volatile.global.v4.b32"] * vectors
    check_waits_hold_whole_vectors(compiled.ttgir, itemsize, 0 if plan.solo else products)


def check_waits_hold_whole_vectors(ttgir, itemsize, least):
    """The wait's assembly loads 16 bytes from the address of each vector's first element. So a
    thread must hold an awaited tile in runs of that length along K, the elements of a run one after
    another; that such a run is adjacent and aligned in memory, the first tries have shown."""
    vector = 16 // itemsize
    waits = re.findall(r'= tt\.elementwise_inline_asm "[^"]*ld\.relaxed.* : (.*) loc', ttgir)
    assert len(waits) >= least
    for types in waits:
        tensors = re.findall(r"tensor<\d+x(\d+)x\d+x(\w+), (#\w+)>", types)
        assert [element for _, element, _ in tensors].count("i64") == 3  # addresses, limits, flags
        assert len(tensors) == types.count("tensor<") == 5
        ((run, layout),) = {(int(run), layout) for run, _, layout in tensors}  # the same for all
        blocks = rf"^{layout} = #ttg\.blocked<{{sizePerThread = \[(\d+), (\d+), (\d+)\],"
        assert re.search(blocks, ttgir, re.M).groups() == ("1", str(vector), "1")
        assert run % vector == 0
    # The first tries hand over what they loaded: nothing moves between the two.
    first_tries = re.findall(r"= tt\.load .*isVolatile.*, (#\w+)>", ttgir)
    assert sorted(first_tries) == sorted(re.search(r"(#\w+)>$", types)[1] for types in waits)


@pytest.mark.parametrize(("sm", "dtype", "H", "B", "backward", "textbook"), H100_BF16, ids=name)
def test_without_spills(sm, dtype, H, B, backward, textbook):
    plan, compiled = build(sm, dtype, H, B, backward, textbook)
    check(plan, compiled, dtype.itemsize, backward, textbook)
    assert compiled.count("LDL") == compiled.count("STL") == 0, f"{compiled.registers} registers"


@pytest.mark.parametrize(("sm", "dtype", "H", "B", "backward", "textbook"), ELSEWHERE, ids=name)
def test_elsewhere(sm, dtype, H, B, backward, textbook):
    plan, compiled = build(sm, dtype, H, B, backward, textbook)
    check(plan, compiled, dtype.itemsize, backward, textbook)


@pytest.mark.parametrize(("backward", "textbook"), PASSES)
def test_full_float32_uses_no_tensor_cores(backward, textbook):
    plan, compiled = build(90, FP32, 256, 16, backward, textbook, tf32=False)
    check(plan, compiled, 4, backward, textbook)
    assert "cvt.rna.tf32" not in compiled.ptx
    assert compiled.count("FFMA") > 500
    assert compiled.count("HMMA") == compiled.count("HGMMA") == 0


@pytest.mark.parametrize("H", [64, 256], ids=["solo", "group"])
@pytest.mark.parametrize(("backward", "textbook"), PASSES)
def test_tf32_operands_are_rounded(backward, textbook, H):
    """The hardware would cut off the bits beyond TF32's: every operand is rounded before."""
    plan, compiled = build(90, FP32, H, 16, backward, textbook)
    threads = 32 * plan.num_warps
    operands = 3 if backward else 2 if textbook else 1
    elements = 3 * plan.BLOCK_H * plan.H_pad + operands * plan.H_pad * plan.BLOCK_B
    assert compiled.ptx.count("cvt.rna.tf32.f32") == elements // threads


@pytest.mark.parametrize("H", [60, 256, 512, 1024])
@pytest.mark.parametrize(("backward", "textbook"), PASSES)
def test_packed(backward, textbook, H):
    plan, compiled = build(90, BF16, H, 64, backward, textbook, packed=True)
    check(plan, compiled, 2, backward, textbook)
    assert compiled.count("LDL") == compiled.count("STL") == 0, f"{compiled.registers} registers"


def test_a_layer_of_two_directions():
    plan = plan_launch(TARGETS[90], B=16, H=512, D=2, itemsize=2, backward=False, textbook=False)
    assert plan.directions == 2
    check(plan, compile_plan(90, plan, BF16, backward=False, textbook=False), 2, False, False)
