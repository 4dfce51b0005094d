"""The model of a step's clocks, on machine code that is written here: what each thing costs."""

from dataclasses import replace

import pytest
import torch

from perf.compiling import TARGETS, compile_plan
from perf.sass import H100, estimate, estimate_listing, find_loop, parse, publish_lines
from trigru import exchange
from trigru.plan import plan_launch

NONE = 7  # of the scoreboards


def code(text, *, stall=1, sets=NONE, reads=NONE, waits=(), line=1):
    """One instruction as nvdisasm prints it."""
    mask = sum(1 << board for board in waits)
    word = (stall | sets << 5 | reads << 8 | mask << 11) << 41
    return (
        f'\t//## File "/some/where/exchange.py", line {line}\n'
        f"        /*0000*/   {text} ;   /* 0x{0:016x} */\n   /* 0x{word:016x} */\n"
    )


def chain(products):
    """So many products, each of which needs the one before."""
    return [code("HMMA.16816.F32 R4, R0, R2, R4", sets=0, waits=[0])] * products


def time_loop(*body, name=".L_x_1"):
    return [f"{name}:\n", *body, code(f"@P0 BRA `({name})", stall=5)]


POLL = [
    ".L_x_2:\n",
    code("LDG.E.128.STRONG.GPU R8, [R6.64]", sets=1),
    code("ISETP.NE.AND P1, PT, R8, -0x1, PT", waits=[1], stall=13),
    code("@P1 BRA `(.L_x_3)", stall=5),
    code("BRA `(.L_x_2)", stall=5),
    ".L_x_3:\n",
]
PUBLISH = [code("STG.E.STRONG.GPU [R6.64], R4", waits=[0, 2], line=46)]
BARRIER = code("BAR.SYNC 0x0", stall=5)


def model(code, *, num_warps=4, steps_per_pass=1, params=H100):
    return estimate_listing(
        "".join(code), num_warps=num_warps, steps_per_pass=steps_per_pass,
        publish_lines={"exchange.py:46"}, rows_frac=1.0, params=params,
    )  # fmt: skip


def test_a_chain_of_products_costs_their_latencies():
    short, long = (model(time_loop(*chain(n))).clocks for n in (4, 14))
    assert long - short == 10 * H100.hmma
    assert short >= 4 * H100.hmma


def test_independent_products_cost_what_the_tensor_cores_take():
    """Two warps on each scheduler: half the rate for each."""
    short, long = (
        model(time_loop(*[code("HMMA.16816.F32 R4, R0, R2, R4")] * n, BARRIER), num_warps=8).clocks
        for n in (20, 40)
    )
    assert long - short == pytest.approx(20 * 2 * H100.hmma_interval, rel=0.2)


def test_a_barrier_waits_for_the_last_warp():
    """Eight warps on four schedulers: each waits for the products of two."""
    products = [code("HMMA.16816.F32 R4, R0, R2, R4")] * 20
    without, with_one = (
        model(time_loop(*products, *barrier), num_warps=8) for barrier in ([], [BARRIER])
    )
    assert (without.barriers, with_one.barriers) == (0, 1)
    assert with_one.clocks >= 2 * 20 * H100.hmma_interval + H100.barrier
    assert with_one.clocks > without.clocks


def test_a_wait_ends_when_the_data_is_visible():
    exchanged = time_loop(*POLL, *chain(4), *PUBLISH)
    slower = replace(H100, store_visible=H100.store_visible + 500)
    near, far = (model(exchanged, params=params) for params in (H100, slower))
    assert far.clocks - near.clocks == pytest.approx(500, rel=0.2)
    # From the last store: until it is visible, and until a poll that saw it is back.
    assert near.clocks > H100.store_visible + H100.l2_round_trip / 2 + 4 * H100.hmma
    assert near.low <= near.clocks <= near.high


def test_a_tile_is_visible_after_its_last_store():
    """Products after a tile's only store pass while it becomes visible; those before do not."""
    early = model(time_loop(*POLL, *PUBLISH, *chain(6)))
    late = model(time_loop(*POLL, *PUBLISH, *chain(6), *PUBLISH))
    assert late.clocks - early.clocks == pytest.approx(6 * H100.hmma, rel=0.3)


def test_the_error_flag_is_not_what_is_waited_for():
    """Its register may have held a tile that was begun too early, and then moved: nothing waits for
    that any more."""
    flag = [
        code("@P2 BRA `(.L_x_4)", stall=5),
        code("LDG.E.STRONG.SYS R12, [R2.64]", sets=3),
        ".L_x_4:\n",
    ]
    poll = [*POLL[:4], *flag, *POLL[4:]]
    begun = code("LDG.E.128.STRONG.GPU R12, [R6.64+0x100]", sets=4)
    with_flag, without = (
        model(time_loop(*wait, *chain(4), *PUBLISH, begun)) for wait in (poll, POLL)
    )
    assert with_flag.clocks == pytest.approx(without.clocks, rel=0.05)


BEGIN = code("LDG.E.128.STRONG.GPU R16, [R6.64+0x100]", sets=4)


def settle(register, *, copy=()):
    """A wait for what was begun, as ptxas lays it out: a look, and a loop that ends in another."""
    look = [code(f"ISETP.NE.AND P1, PT, {register}, -0x1, PT", waits=[1, 4], stall=13)]
    return [
        *copy, *look,
        code("@P1 BRA `(.L_x_8)", stall=5),
        ".L_x_6:\n",
        code("@P2 BRA `(.L_x_5)", stall=5),
        code("LDG.E.STRONG.SYS R3, [R2.64]", sets=3),
        code("@P3 BRA `(.L_x_8)", waits=[3], stall=5),
        ".L_x_5:\n",
        code("@P4 BRA `(.L_x_7)", stall=5),  # the limit
        code(f"LDG.E.128.STRONG.GPU {register}, [R6.64+0x100]", sets=1), *look,
        code("@!P1 BRA `(.L_x_6)", stall=5),
        code("BRA `(.L_x_8)", stall=5),
        ".L_x_7:\n",
        code("STG.E.STRONG.SYS [R2.64], R3"),
        ".L_x_8:\n",
    ]  # fmt: skip


SETTLES = {
    "in place": settle("R16"),
    "copied": settle("R20", copy=[code("IMAD.MOV.U32 R20, RZ, RZ, R16", waits=[4])]),
    "copied on sm_120": settle("R20", copy=[code("MOV R20, R16   &req={4} ?trans1", waits=[4])]),
}


@pytest.mark.parametrize("settled", SETTLES.values(), ids=SETTLES.keys())
def test_what_was_begun_when_it_was_there_is_not_waited_for(settled):
    """It costs a look, and nothing of its loop: no other look, and not what follows the limit."""
    hidden = model(time_loop(*POLL, BEGIN, *chain(12), *settled, *PUBLISH))
    without = model(time_loop(*POLL, *chain(12), *PUBLISH))
    assert hidden.clocks - without.clocks < 30
    assert hidden.issued["ISETP"] == hidden.issued["LDG"]  # a look for each load
    assert hidden.issued["STG"] == 1


@pytest.mark.parametrize("settled", SETTLES.values(), ids=SETTLES.keys())
def test_what_was_begun_too_early_is_waited_for(settled):
    """Right after the last store L2 shows nothing yet: the first look misses, and the loop ends as
    any that polls."""
    early = model(time_loop(*settled, *chain(4), *PUBLISH, BEGIN))
    polled = model(time_loop(*POLL, *chain(4), *PUBLISH))
    assert early.clocks == pytest.approx(polled.clocks, rel=0.1)
    assert early.issued["LDG"] > 1 and early.issued["STG"] == 1


def test_phases_add_up_to_the_step():
    result = model(time_loop(*POLL, *chain(4), code("LDS R9, [R3]", waits=[0], sets=2), *PUBLISH))
    (p,) = result.phases
    assert p.wait > H100.store_visible
    assert p.products >= 4 * H100.hmma
    assert p.reduction >= H100.lds - 2
    total = p.wait + p.operand + p.products + p.reduction + p.gates
    assert total == pytest.approx(result.clocks, rel=0.1)


def test_a_pass_of_two_steps_and_a_second_loop_for_an_odd_last_one():
    step = [*POLL, *chain(4), *PUBLISH]
    other = [text.replace(".L_x_2", ".L_x_4").replace(".L_x_3", ".L_x_5") for text in step]
    last = [text.replace(".L_x_2", ".L_x_6").replace(".L_x_3", ".L_x_7") for text in step]
    pairs = [*time_loop(*step, *other), *time_loop(*last, name=".L_x_8")]
    loop = find_loop(*parse("".join(pairs)))
    assert (loop.start, len(loop.polls)) == (0, 2)
    one, two = model(time_loop(*step)), model(pairs, steps_per_pass=2)
    assert two.clocks == pytest.approx(one.clocks, rel=0.1)
    assert two.issued["HMMA"] == one.issued["HMMA"] == 4
    assert len(two.phases) == 2
    with pytest.raises(ValueError, match="1 waits in a loop of 2 steps"):
        model(time_loop(*step), steps_per_pass=2)


def test_the_loop_of_two_steps_is_not_the_loop_around_it():
    """Which holds as many products, as does that over a program's batch tiles."""
    inner = time_loop(*chain(4))
    assert find_loop(*parse("".join(time_loop(*inner, *[code("NOP")] * 9, name=".L_x_9")))).end == 4


def test_spills_are_counted():
    spilled = [code("STL [R1], R4"), code("LDL R4, [R1]"), code("LDL R5, [R1+0x4]")]
    result = model([code("STL [R1], R9"), *time_loop(*chain(1), *spilled)])
    assert result.spills == 3
    assert result.issued == {"HMMA": 1, "STL": 1, "LDL": 2, "BRA": 1}


def test_a_branch_is_one_however_it_is_written():
    """ptxas makes a call of some, which does not return."""
    call = [line.replace("@P1 BRA", "@P1 CALL.REL.NOINC") for line in POLL]
    assert call != POLL
    branch, other = (model(time_loop(*PUBLISH, *poll, *chain(2))) for poll in (POLL, call))
    assert other == replace(branch, issued=other.issued) and branch.clocks > 0


def test_what_cannot_be_estimated_is_said():
    with pytest.raises(ValueError, match="no time loop"):
        model([*chain(4), code("EXIT")])
    with pytest.raises(ValueError, match="the time loop waits, but none of"):
        model(time_loop(*POLL, *chain(4), code("STG.E [R6.64], R4", line=45)))


def test_the_lines_that_publish(tmp_path):
    module = tmp_path / "exchange.py"
    module.write_text("def peek(a):\n    pass\n\n@jit\ndef publish(a):\n    b\n    c\n\nd = 1\n")
    assert publish_lines(module) == {f"exchange.py:{n}" for n in (5, 6, 7)}
    with pytest.raises(ValueError, match="has no function store"):
        publish_lines(module, "store")


def test_a_compiled_kernel():
    """Each warp publishes and waits, and multiplies its part of K for three gates."""
    plan = plan_launch(TARGETS[90], B=16, H=256, D=1, itemsize=2, backward=False, textbook=False)
    compiled = compile_plan(90, plan, torch.bfloat16, backward=False, textbook=False)
    result = estimate(
        compiled.cubin, num_warps=plan.num_warps, steps_per_pass=2,
        publish_lines=publish_lines(exchange.__file__),
    )  # fmt: skip
    assert H100.store_visible + H100.l2_round_trip < result.low <= result.clocks <= result.high
    assert result.barriers == 1
    assert result.spills == 0
    assert result.issued["HMMA"] > 0
    assert len(result.phases) == 2
    for phases in result.phases:
        assert phases.wait > H100.store_visible
