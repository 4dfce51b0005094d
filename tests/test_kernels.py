"""The compiled kernels, executed: whole launches in the emulator, with all that it checks.

Cases that differ only in T, B, lengths, seed or plan's grid share a kernel, and its compilation."""

import zlib
from dataclasses import replace

import pytest
import torch
from emulator import Emulator, why_not
from emulator.cases import (
    Case,
    pair,
    plan_of,
    problem_of,
    run_kernels,
    tiles_of_library,
    what_is_wrong,
)

from trigru import backward, forward, launch

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

VARIANTS = (False, True)  # textbook
SOLO, LATENCY, STAGED, WGMMA = (
    {"form": "solo", "H": 21},
    {"form": "latency", "H": 29},
    {"form": "throughput", "H": 72},
    {"form": "throughput wgmma", "H": 100},
)
EVERY = (SOLO, LATENCY, STAGED, WGMMA)
# Each kind of product on one device at least, and the mma that both have on both.
TARGETS = [(90, "bf16"), (90, "fp16"), (90, "tf32"), (80, "bf16"), (80, "tf32"), (80, "ieee")]


def fits(target, shape):
    return target == (90, "bf16") or target == (90, "fp16") or "wgmma" not in shape["form"]


def seeded(cases):
    """Each with a seed of its own, which a case that is added or removed leaves alone."""
    return [replace(case, seed=zlib.crc32(str(case).encode()) % 1000) for case in cases]


def on(cases):
    return pytest.mark.parametrize("case", seeded(cases), ids=str)


def check(case):
    wrong, _ = what_is_wrong(case)
    assert not wrong, "\n".join(wrong[:9])


def is_needless(target, shape, textbook):
    """What two devices have alike is computed on each of them, but by turns."""
    if target == (90, "tf32"):
        return textbook == (shape is LATENCY)
    return target == (80, "bf16") and textbook != (shape is SOLO)


@on(
    Case(*target, textbook, B=B, T=T, **shape)
    for target in TARGETS
    for textbook in VARIANTS
    for shape in EVERY
    for B, T in ((5, 6), (19, 2), (1, 1))
    if fits(target, shape) and (target != TARGETS[1] or B == 5)
    if not is_needless(target, shape, textbook)
)
def test_numbers(case):
    check(case)


LARGE = Case(90, "bf16", False, H=200, B=70, T=2)
SMALL = Case(90, "bf16", True, H=100, B=40, T=2)


@on(
    replace(case, form=f"tile {i}")
    for case in (LARGE, SMALL)
    for i in range(max(len(tiles_of_library(case, backward=b)) for b in (False, True)))
)
def test_every_tile_that_the_library_chooses_from(case):
    check(case)


TORCH, TEXTBOOK = VARIANTS


@on(
    Case(*TARGETS[i], textbook, **{"B": 5, "T": 4} | shape)
    for i, variants, shape in (
        (0, VARIANTS, LATENCY | {"H": 200}),  # chunks, one after another
        (4, [TORCH], LATENCY | {"H": 100}),
        (0, VARIANTS, {"form": "latency 8 warps", "H": 40}),
        (4, [TEXTBOOK], {"form": "latency 8 warps", "H": 40}),
        (0, VARIANTS, {"form": "latency16", "H": 40, "B": 15}),
        (4, [TEXTBOOK], {"form": "latency16", "H": 40, "B": 15}),
        (0, VARIANTS, {"form": "latency shared", "H": 200}),
        (3, [TEXTBOOK], {"form": "latency shared", "H": 200}),
        (5, [TORCH], {"form": "latency shared", "H": 100}),
        (1, VARIANTS, {"form": "solo16", "H": 31, "B": 15}),
        (3, [TORCH], {"form": "solo16", "H": 32, "B": 15}),
        (0, VARIANTS, {"form": "solo wgmma", "H": 60, "B": 15}),
        (1, [TEXTBOOK], {"form": "solo wgmma", "H": 100, "lengths": (4, 4, 2, 2, 1)}),
        (0, VARIANTS, {"form": "throughput wgmma 8 warps", "H": 131, "B": 20}),
        (1, [TORCH], {"form": "throughput wgmma 8 warps", "H": 100, "lengths": (4, 4, 2, 2, 1)}),
        (0, VARIANTS, STAGED | {"H": 71}),  # the last unit has no neighbour
        (0, VARIANTS, WGMMA | {"H": 131, "B": 20}),
        (3, [TORCH], STAGED | {"H": 128, "B": 20}),  # nothing is padded
        (0, [TORCH], SOLO | {"H": 1, "B": 1, "T": 2}),
        (5, [TEXTBOOK], SOLO | {"H": 1, "B": 1, "T": 2}),
        (4, VARIANTS, LATENCY | {"H": 64, "D": 2}),
        (4, VARIANTS, LATENCY | {"H": 64, "D": 2, "directions": 1}),
        (0, [TEXTBOOK], STAGED | {"D": 2}),
        (3, VARIANTS, SOLO | {"H": 32, "D": 2}),
        (0, [TEXTBOOK], LATENCY | {"reverse": True}),
        (3, [TORCH], STAGED | {"reverse": True}),
        (4, [TEXTBOOK], SOLO | {"reverse": True}),
        (0, [TORCH], {"H": 130, "T": 2}),  # as the library would plan it
    )
    for textbook in variants
)
def test_forms_and_directions(case):
    check(case)


@on(
    Case(90, "bf16", textbook, B=B, T=T, batch_programs=programs, **shape)
    for textbook in VARIANTS
    for shape in EVERY
    for B, T, programs in ((33, 3, None), (33, 3, 1), (40, 2, 2), (16, 1, 1))
)
def test_batch_tiles_side_by_side_and_one_after_another(case):
    check(case)


# Tiles that end early or never begin, rows that join on the way back
LENGTHS = {
    "few": (5, 3, 3, 1),
    "tiles": (4,) * 5 + (3,) * 11 + (2,) * 10 + (1,) * 9,
    "equal": (3, 3),
    "one": (3,),
}


@on(
    Case(*target, textbook, B=len(n), T=n[0], lengths=n, D=D, batch_programs=programs, **shape)
    for textbook in VARIANTS
    for shape in (SOLO, LATENCY, STAGED)
    for target, n, D, programs in (
        (TARGETS[0], LENGTHS["few"], 1, None),
        (TARGETS[0], LENGTHS["tiles"], 1, 1),
        (TARGETS[4], LENGTHS["few"], 2, None),
        (TARGETS[4], LENGTHS["tiles"], 2, None),
        (TARGETS[4], LENGTHS["tiles"], 2, 1),
        (TARGETS[4], LENGTHS["equal"], 2, None),
        (TARGETS[4], LENGTHS["one"], 2, None),
    )
)
def test_packed_numbers(case):
    check(case)


@on(
    Case(90, "bf16", textbook, B=len(n), T=n[0], lengths=n, reverse=True, **shape)
    for textbook, shape in (
        (TORCH, SOLO),
        (TORCH, LATENCY),
        (TEXTBOOK, LATENCY),
        (TEXTBOOK, STAGED),
        (TORCH, WGMMA),
    )
    for n in ((5, 4, 1), LENGTHS["tiles"])
)
def test_packed_one_direction_reversed(case):
    check(case)


@on(
    Case(90, "bf16", False, B=len(n), T=n[0], lengths=n, **SOLO)
    for n in ((40,) * 8 + (37,), (37,) * 9 + (1,), (33,) * 8 + (32,) * 9 + (31,), (50, 1), (1, 1))
)
def test_tiles_end_with_their_first_sequence(case):
    check(case)


@on(
    Case(sm, "bf16", textbook, B=5, T=3, **shape, **what)
    for sm, shape, textbook in ((90, LATENCY, False), (80, SOLO, False), (90, STAGED, True))
    for what in ({"bias": False}, {"save": False}, {"offset": 1}, {"offset": 3})
)
def test_without_bias_or_saved_gates_and_from_any_address(case):
    check(case)


ALL = {"resets": "learned", "scaled": True, "clip": 0.4}


@on(
    Case(*TARGETS[i], textbook, **{"B": 9, "T": 5} | shape | what)
    for i, textbook, shape, what in (
        *((0, textbook, shape, ALL) for textbook in VARIANTS for shape in EVERY),
        *((0, i % 2 == 0, shape, {"resets": "zero"}) for i, shape in enumerate(EVERY)),
        (4, TORCH, LATENCY, {"resets": "learned", "T": 6}),
        (4, TEXTBOOK, STAGED, {"scaled": True}),
        (5, TORCH, SOLO, ALL | {"bias": False}),
        (1, TEXTBOOK, STAGED | {"H": 71}, ALL),  # the last unit has no neighbour
        (3, TORCH, LATENCY, {"clip": 0.3, "resets": "zero"}),
        (0, TORCH, STAGED, {"clip": 0.3}),
        (0, TORCH, LATENCY, {"resets": "learned", "reverse": True}),
        (0, TEXTBOOK, SOLO, {"resets": "zero", "reverse": True}),
        (0, TORCH, WGMMA, ALL | {"D": 2}),
        (0, TEXTBOOK, LATENCY, {"resets": "learned", "D": 2, "lengths": (5, 4, 4, 2, 1, 1)}),
        (3, TORCH, SOLO, {"resets": "zero", "D": 2, "B": 20, "lengths": (4,) * 9 + (2,) * 11}),
        (0, TORCH, STAGED, {"resets": "learned", "reverse": True, "lengths": (5, 3, 3, 1)}),
    )
)
def test_what_a_step_is_changed_by(case):
    check(replace(case, B=len(case.lengths or ()) or case.B))


@on(
    Case(*TARGETS[0], textbook, B=9, T=71, resets="learned", **shape)
    for textbook, shape in (
        (TORCH, SOLO),
        (TEXTBOOK, LATENCY),
        (TORCH, LATENCY | {"reverse": True}),
        (TORCH, STAGED),
    )
)
def test_resets_of_more_steps_than_a_word_has(case):
    check(case)


def test_words_of_resets_of_more_tiles_than_a_grid_has(monkeypatch):
    monkeypatch.setattr(launch, "MAX_GRID", 1)
    check(Case(*TARGETS[0], TORCH, B=40, T=35, D=2, resets="zero", seed=3, **SOLO))
    check(Case(*TARGETS[0], TEXTBOOK, B=20, T=3, resets="zero", seed=4, **LATENCY))


@on(
    Case(*TARGETS[i], textbook, B=9, T=4, D=D, heads=heads, resets=resets, **shape)
    for i, textbook, shape, D, heads, resets in (
        (0, TORCH, LATENCY, 3, 3, ""),
        (0, TEXTBOOK, SOLO, 4, 2, "learned"),
        (4, TORCH, STAGED, 4, 2, "zero"),
        (0, TORCH, SOLO | {"clip": 0.3}, 4, 2, "zero"),
        (0, TEXTBOOK, LATENCY | {"scaled": True}, 4, 1, "learned"),  # an ensemble of two directions
    )
)
def test_heads_are_recurrences_side_by_side(case):
    check(case)


@on(
    Case(*TARGETS[i], textbook, B=9, T=4, **shape, **what)
    for i, textbook, shape, what in (
        (0, TORCH, LATENCY, {"loss": "y"}),
        (0, TEXTBOOK, SOLO, {"loss": "h_n", "resets": "learned"}),
        (4, TORCH, STAGED, {"loss": "h_n"}),
        (0, TORCH, WGMMA, {"carried": True}),
        (1, TEXTBOOK, SOLO, {"carried": True}),
        (0, TEXTBOOK, LATENCY, {"carried": True, "resets": "zero"}),
    )
)
def test_one_loss_alone_and_a_state_in_float32(case):
    check(case)


@on(
    Case(*TARGETS[0], textbook, B=5, T=4, where=where, poison=value, resets="zero", **shape)
    for textbook, shape, where, value in (
        (TORCH, LATENCY, "gx", "nan"),
        (TEXTBOOK, SOLO, "h0", "inf"),
        (TORCH, STAGED, "h0", "nan"),
        (TEXTBOOK, LATENCY, "h0", "inf"),
    )
)
def test_nothing_that_is_not_finite_crosses_a_reset(case):
    check(case)


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize(
    "case",
    seeded(
        replace(case, resets=resets)
        for case, resets in (
            (Case(90, "bf16", False, B=9, T=37, carried=True, **LATENCY), "learned"),
            (Case(90, "fp16", True, B=9, T=7, carried=True, **SOLO), ""),
            (Case(90, "bf16", False, B=9, T=6, carried=True, **WGMMA), "zero"),
            (Case(80, "tf32", True, B=9, T=5, **STAGED), "learned"),
        )
    ),
    ids=str,
)
def test_chunks_are_the_whole_bit_for_bit(case, reverse):
    """From the state that the chunk before left, in float32; chunks of one step and of odd and even
    numbers of steps, from the walk's first step on."""
    inputs, _ = problem_of(case)
    how = {"offsets": None, "textbook": case.textbook, "reverse": reverse, "save": True}
    how |= {"bidirectional": False, "plan": plan_of(case, backward=False)}
    how |= {"reset_state": inputs.pop("reset_state", None)}

    def walk(steps, h0):
        given = inputs | {"gx": inputs["gx"][steps].contiguous(), "h0": h0}
        resets = None if case.mask is None else case.mask[steps].contiguous()
        with Emulator(sm=case.sm, tf32=case.precision == "tf32", seed=case.seed) as emulator:
            results = forward.gru_forward(**given, **how, resets=resets)
        assert not emulator.faults
        return results

    whole = walk(slice(None), inputs["h0"])
    y, gates, h = torch.empty_like(whole[0]), torch.empty_like(whole[2]), inputs["h0"]
    begin = 0
    for end in (1, 3, case.T - 1, case.T):
        steps = slice(case.T - end, case.T - begin) if reverse else slice(begin, end)
        y[steps], h, gates[steps] = walk(steps, h)
        begin = end
    for ours, theirs in zip((y, h, gates), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_more_steps_than_cudnn_takes():
    """66,000 at once end as the last 33,000 alone, bit for bit: in float32, gradients too."""
    T, half = 66_000, 33_000
    case = Case(80, "ieee", False, H=3, B=1, T=T, form="solo", resets="zero", seed=1)
    inputs, cotangents = problem_of(case)
    gx, mask, dy = inputs["gx"], case.mask, cotangents["dy"]
    how = {"offsets": None, "textbook": False, "reverse": False, "bidirectional": False}
    plans = [plan_of(case, backward=b) for b in (False, True)]
    others = {k: inputs[k] for k in ("w_hh", "b_hh")}

    def walk(steps, h0):
        given = how | {"resets": mask[steps].contiguous(), "save": True, "plan": plans[0]}
        return forward.gru_forward(gx=gx[steps].contiguous(), h0=h0, **others, **given)

    def back(steps, dh_n, h0, y, gates):
        given = how | {"resets": mask[steps].contiguous(), "plan": plans[1]}
        dy_part = dy[steps].contiguous()
        return backward.gru_backward(dy_part, dh_n, h0, inputs["w_hh"], y, gates, **given)

    first, second, h0 = slice(0, half), slice(half, T), inputs["h0"]
    with Emulator(sm=80) as emulator:
        y, h_n, gates = walk(slice(0, T), h0)
        h1 = y[half - 1].transpose(0, 1).contiguous()
        y2, h2, gates2 = walk(second, h1)
        dgx, _, dh0, *_ = back(slice(0, T), cotangents["dh_n"], h0, y, gates)
        dgx2, _, dh1, *_ = back(second, cotangents["dh_n"], h1, y2, gates2)
        dgx1, _, dh, *_ = back(first, dh1, h0, y[first], gates[first])
    assert not emulator.faults
    pairs = ((y[second], y2), (gates[second], gates2), (h_n, h2), (dgx[second], dgx2))
    for whole, part in (*pairs, (dgx[first], dgx1), (dh0, dh)):
        assert torch.equal(whole, part)


@on(
    Case(*target, textbook, B=17, T=4, again=3, **shape)
    for target, shape in ((TARGETS[0], LATENCY), (TARGETS[4], LATENCY), (TARGETS[0], WGMMA))
    for textbook in VARIANTS
)
def test_same_bits_whatever_the_schedule(case):
    check(case)


@on(
    Case(*target, textbook, B=5, T=4, where=where, poison=value, **shape)
    for target in (TARGETS[0], TARGETS[1], TARGETS[4], TARGETS[5])
    for textbook in VARIANTS
    for shape in (*EVERY, STAGED | {"H": 71})
    for where in ("gx", "h0")
    for value in ("nan", "inf")
    if fits(target, shape) and (target == TARGETS[0] or shape in (SOLO, LATENCY))
)
def test_not_finite_stays_in_its_row(case):
    check(case)


@on(
    Case(90, "bf16", textbook, B=5, T=4, where="h0", poison="held", **shape)
    for textbook in VARIANTS
    for shape in (*EVERY, STAGED | {"H": 71})
)
def test_an_infinite_state_that_stays_meets_no_padding(case):
    check(case)


@on(
    Case(80, "tf32", textbook, B=3, T=4, D=2, lengths=(4, 3, 1), where="h0", row=row,
         poison="nan", **shape)
    for textbook in VARIANTS
    for shape in (SOLO, LATENCY)
    for row in range(3)
)  # fmt: skip
def test_nan_stays_in_its_packed_sequence(case):
    check(case)


@on(
    Case(*target, textbook, B=3, T=5, missing=True, **shape)
    for target, shape in ((TARGETS[0], LATENCY), (TARGETS[4], LATENCY), (TARGETS[3], STAGED))
    for textbook in VARIANTS
)
def test_missing_program_is_reported(case):
    check(case)  # the next launch refuses
    check(replace(case, missing=False))  # once; then the flag is down again


@on(
    Case(*target, textbook, B=5, T=3, far=tile, **shape)
    for target in (TARGETS[0], TARGETS[4])
    for textbook in VARIANTS
    for shape in (SOLO, LATENCY, STAGED)
    for tile in (10**6, 10**8)
)
def test_rows_beyond_four_gigabytes(case):
    check(case)


@on(
    Case(*TARGETS[0], textbook, B=5, T=3, far=10**8, **shape, **ALL | {"clip": None})
    for textbook, shape in ((TORCH, SOLO), (TEXTBOOK, LATENCY), (TORCH, STAGED))
)
def test_resets_of_rows_beyond_four_gigabytes(case):
    check(case)


@on(
    Case(*target, textbook, B=5, T=3, D=4, lengths=lengths, directions=3, **shape)
    for textbook in VARIANTS
    for target, shape, lengths in (
        (TARGETS[3], SOLO | {"H": 32}, None),
        (TARGETS[0], LATENCY, (3, 3, 2, 1, 1)),
    )
)
def test_an_ensemble_is_its_members(case):
    """More recurrences than one launch computes, beside launches of their own: the same bits."""
    check(case)
    inputs, cotangents = problem_of(case)
    how = {"sm": case.sm, "tf32": case.precision == "tf32"}
    together = run_kernels(case, inputs, cotangents, Emulator(**how, seed=case.seed))
    two = replace(case, D=2, directions=None)
    for d in range(0, case.D, 2):
        ours, alone = pair(together, d), Emulator(**how, seed=d)
        for name, t in run_kernels(two, pair(inputs, d), pair(cotangents, d), alone).items():
            assert torch.equal(ours[name], t), name
        assert not alone.faults


@pytest.mark.parametrize("textbook", VARIANTS, ids=["torch", "textbook"])
def test_an_empty_batch_launches_nothing(textbook):
    case = Case(90, "bf16", textbook, B=1, T=3, **LATENCY)
    plan = plan_of(case, backward=False)
    inputs, _ = problem_of(replace(case, B=0))
    with Emulator() as emulator:
        y, h_n, _ = forward.gru_forward(
            **inputs, offsets=None, textbook=textbook, reverse=False, bidirectional=False,
            save=True, plan=plan,
        )  # fmt: skip
    assert y.shape == (3, 0, 1, 29) and h_n.shape == (1, 0, 29) and emulator.results == []
    launch.raise_if_failed(y.device)
