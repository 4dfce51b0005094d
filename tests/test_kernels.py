"""The real kernels, interpreted, every program of a launch in a process of its own."""

import interpreted as cases
import pytest
import torch
from triton.runtime.errors import InterpreterError

VARIANTS = pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# Each is (T, B, plan); H is odd where it can be, so that units, rows and chunks are padded.
SHAPES = {
    "solo": (6, 5, cases.make_plan(21, solo=True)),
    "solo, two directions": (3, 17, cases.make_plan(32, D=2, solo=True)),
    "solo, one unit": (2, 1, cases.make_plan(1, solo=True)),
    "group": (6, 13, cases.make_plan(64, BLOCK_K=64, SPLIT_K=4)),
    "group, two chunks, padded": (5, 3, cases.make_plan(51)),
    "group, not split": (3, 2, cases.make_plan(48, BLOCK_K=16, SPLIT_K=1)),
    "group, two directions": (4, 3, cases.make_plan(31, D=2)),
    "group, a launch for each direction": (4, 3, cases.make_plan(32, D=2, directions=1)),
    "group, batch tiles side by side": (3, 33, cases.make_plan(32)),
    "group, batch tiles one after another": (3, 33, cases.make_plan(32, batch_programs=1)),
    "group, one step": (1, 1, cases.make_plan(32)),
    "group, wide blocks": (3, 4, cases.make_plan(64, BLOCK_H=32, BLOCK_K=64, SPLIT_K=2)),
}


@VARIANTS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers(interpreted, shape, dtype, textbook):
    T, B, plan = SHAPES[shape]
    interpreted(cases.within_rule, T, B, plan, dtype, textbook=textbook)


@VARIANTS
@pytest.mark.parametrize("solo", [True, False], ids=["solo", "group"])
def test_one_direction_reversed(interpreted, solo, textbook):
    plan = cases.make_plan(29, solo=solo)
    interpreted(cases.within_rule, 5, 3, plan, torch.float32, textbook=textbook, reverse=True)


# Each is (plan, lengths): tiles that end early or never begin, and rows that join on the way back.
PACKED = {
    "solo": (cases.make_plan(21, solo=True), [6, 4, 4, 1]),
    "solo, several tiles": (cases.make_plan(16, BLOCK_K=16, solo=True, D=2), [5] * 3 + [2] * 20),
    "group": (cases.make_plan(31), [5, 3, 3, 1]),
    "group, two directions": (cases.make_plan(48, BLOCK_K=16, D=2), [4, 4, 2]),
    "group, several tiles": (cases.make_plan(32), [4] * 5 + [3] * 11 + [2] * 10 + [1] * 9),
    "group, tiles one after another": (
        cases.make_plan(32, D=2, batch_programs=1, directions=1), [3] * 10 + [1] * 10,
    ),
    "group, equal lengths": (cases.make_plan(32), [3, 3]),
    "group, one sequence": (cases.make_plan(32, D=2), [3]),
}  # fmt: skip


@VARIANTS
@DTYPES
@pytest.mark.parametrize("shape", PACKED)
def test_packed_numbers(interpreted, shape, dtype, textbook):
    plan, lengths = PACKED[shape]
    T, B = lengths[0], len(lengths)
    interpreted(cases.within_rule, T, B, plan, dtype, textbook=textbook, lengths=lengths)


@VARIANTS
@pytest.mark.parametrize("solo", [True, False], ids=["solo", "group"])
def test_packed_one_direction_reversed(interpreted, solo, textbook):
    plan, lengths = cases.make_plan(29, solo=solo), [5, 4, 1]
    interpreted(
        cases.within_rule, 5, 3, plan, torch.float32, textbook=textbook, reverse=True,
        lengths=lengths,
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [[1], [5, 3, 3, 1], [700, 512, 257, 256, 255, 1]], ids=str)
def test_tiles_end_with_their_first_sequence(interpreted, lengths):
    interpreted(cases.tiles_end_with_their_first_sequence, lengths)


def test_without_bias(interpreted):
    plan = cases.make_plan(32)
    interpreted(cases.within_rule, 3, 2, plan, torch.float32, textbook=False, bias=False)


@VARIANTS
def test_same_bits_every_time(interpreted, textbook):
    interpreted(cases.same_bits_twice, cases.make_plan(32), textbook=textbook)


@VARIANTS
@pytest.mark.parametrize("lengths", [None, [3, 3, 2, 1, 1]], ids=["dense", "packed"])
@pytest.mark.parametrize("solo", [True, False], ids=["solo", "group"])
def test_an_ensemble_is_its_members(interpreted, solo, lengths, textbook):
    plans = (cases.make_plan(32, D=D, solo=solo, directions=min(D, 3)) for D in (4, 2))
    interpreted(cases.an_ensemble_is_its_members, *plans, textbook=textbook, lengths=lengths)


@VARIANTS
@pytest.mark.parametrize("where", ["gx", "h0"])
@pytest.mark.parametrize(
    ("value", "dtype", "solo"),
    [
        ("nan", torch.float32, True),
        ("inf", torch.float32, True),
        ("nan", torch.float16, False),
        ("nan", torch.float32, False),
        ("inf", torch.float32, False),
    ],
)
def test_not_finite_stays_in_its_row(interpreted, solo, value, where, dtype, textbook):
    plan = cases.make_plan(29, solo=solo)
    interpreted(cases.not_finite_stays_in_its_row, plan, dtype, where, value, textbook=textbook)


@VARIANTS
@pytest.mark.parametrize("b", [0, 1, 2])
@pytest.mark.parametrize("solo", [True, False], ids=["solo", "group"])
def test_nan_stays_in_its_packed_sequence(interpreted, solo, b, textbook):
    plan = cases.make_plan(29, D=2, solo=solo)
    interpreted(cases.nan_stays_in_its_packed_sequence, plan, b, textbook=textbook)


@VARIANTS
def test_missing_program_is_reported(interpreted, textbook):
    interpreted(
        cases.missing_program_is_reported, cases.make_plan(48, BLOCK_K=16), textbook=textbook
    )


@pytest.mark.parametrize("numpy, excused", [("2.3.5", False), ("2.4.0", True), ("2.10.1", True)])
def test_an_interpreter_that_is_broken_is_excused_by_numpy_alone(monkeypatch, numpy, excused):
    """A skip must not hide that the kernels are not interpreted where they should be."""

    class Broken:
        def __getitem__(self, grid):
            raise InterpreterError("only 0-dimensional arrays")

    monkeypatch.setattr(cases, "_count_kernel", Broken())
    monkeypatch.setattr(cases.np, "__version__", numpy)
    if excused:
        assert f"does not run with NumPy {numpy}" in cases.broken_interpreter()
    else:
        with pytest.raises(InterpreterError):
            cases.broken_interpreter()
