"""What test_kernels.py checks, run where kernels are interpreted: see conftest's `interpreted`.

The launchers are the library's own; only the kernels are replaced, by ones that run every program
of the launch in a process of its own, and the bound on waits, which counts polls here.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from concurrent_interpreter import Concurrently
from numerics import assert_within_rule
from triton.runtime.errors import InterpreterError

from trigru import backward, derivatives, forward, launch, reference
from trigru.accuracy import RESULTS, problem, yardsticks
from trigru.plan import LaunchPlan
from trigru.tiles import steps_of_tile

POLLS = 10**5  # at 0.1 ms and more each
FORWARD, BACKWARD = forward._gru_forward_kernel, backward._gru_backward_kernel
ALL_ONES = {torch.float16: torch.int16, torch.float32: torch.int32}


def make_plan(
    H: int, D: int = 1, *, solo: bool = False, BLOCK_H: int = 16, BLOCK_K: int = 32,
    SPLIT_K: int = 2, directions: int | None = None, batch_programs: int = 8,
) -> LaunchPlan:  # fmt: skip
    """A small plan for the interpreter, with the structure of a real one."""
    H_pad = -(-H // BLOCK_K) * BLOCK_K
    if solo:
        BLOCK_H, SPLIT_K = BLOCK_K, 1
    return LaunchPlan(
        H=H, D=D, H_pad=H_pad, BLOCK_H=BLOCK_H, BLOCK_B=16, BLOCK_K=BLOCK_K, SPLIT_K=SPLIT_K,
        num_warps=4, spin=0, solo=solo, directions=directions or D, batch_programs=batch_programs,
        shared_bytes=0,
    )  # fmt: skip


def run_kernels(
    inputs: dict, cotangents: dict, plan: LaunchPlan, *, textbook: bool, reverse: bool = False,
    offsets: torch.Tensor | None = None, bidirectional: bool | None = None, here: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Forward and backward through the library's launchers and its weight gradients."""
    forward._gru_forward_kernel = FORWARD if here else Concurrently(FORWARD)
    backward._gru_backward_kernel = BACKWARD if here else Concurrently(BACKWARD)
    launch.wait_limit = lambda T: POLLS
    h0, w_hh = inputs["h0"], inputs["w_hh"]
    walk = {"reverse": reverse, "bidirectional": bidirectional or plan.D == 2}
    y, h_n, gates = forward.gru_forward(
        **inputs, offsets=offsets, textbook=textbook, **walk, save=True, plan=plan
    )
    dgx, dgh, dh0 = backward.gru_backward(
        cotangents["dy"], cotangents["dh_n"], h0, w_hh, y, gates, offsets,
        textbook=textbook, **walk, plan=plan,
    )  # fmt: skip
    launch.raise_if_failed(y.device)
    before = reference.states_before(y, h0, offsets, **walk)
    dw_hh, db_hh = (
        derivatives.weight_gradients(dgx, before, gates[..., 0, :] * before)
        if textbook
        else derivatives.weight_gradients(dgh, before, before)
    )
    names = RESULTS[:-1] if inputs["b_hh"] is None else RESULTS
    return dict(zip(names, (y, h_n, dgx, dh0, dw_hh, db_hh), strict=False))


@triton.jit
def _count_kernel(count_ptr, T):
    count = 0
    for _ in range(T):
        count += 1
    tl.store(count_ptr, count)


def broken_interpreter() -> str:
    """Why Triton cannot interpret a loop over an argument with this NumPy, or "" if it can, as
    with all that pyproject.toml allows: there it must."""
    count = torch.zeros(1, dtype=torch.int32)
    try:
        _count_kernel[(1,)](count, 3)
    except InterpreterError as error:
        if np.lib.NumpyVersion(np.__version__) < "2.4.0":
            raise
        return (
            f"Triton {triton.__version__}'s interpreter does not run with NumPy {np.__version__}: "
            f"{error}"
        )
    assert count.item() == 3
    return ""


def warm_up() -> None:
    """Interpret each kernel once in this process: Triton rewrites the source of every function at
    its first call, which each forked program would do again."""
    torch.set_num_threads(1)  # the processes of a launch are forked, and have no other threads
    plan = make_plan(16, BLOCK_K=16, SPLIT_K=1)  # a group of one program
    for textbook in (False, True):
        inputs, cotangents = problem(1, 1, 1, 16, textbook=textbook, dtype=torch.float32)
        run_kernels(inputs, cotangents, plan, textbook=textbook, here=True)


def within_rule(
    T: int, B: int, plan: LaunchPlan, dtype: torch.dtype, *, textbook: bool, reverse: bool = False,
    bias: bool = True, lengths: list[int] | None = None,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    offsets = None if lengths is None else offsets_of(lengths)
    inputs, cotangents = problem(
        T, B, plan.D, plan.H, textbook=textbook, dtype=dtype, offsets=offsets
    )
    if not bias:
        inputs["b_hh"] = None
    how = {"textbook": textbook, "reverse": reverse, "offsets": offsets}
    actual = run_kernels(inputs, cotangents, plan, **how)
    exact, yardstick = yardsticks(inputs, cotangents, **how)
    assert_within_rule(actual, exact, yardstick)


def offsets_of(lengths: list[int]) -> torch.Tensor:
    """Where each step's rows begin, for packed sequences of these lengths, the longest first."""
    assert lengths == sorted(lengths, reverse=True)
    running = [sum(n > t for n in lengths) for t in range(lengths[0])]
    return torch.tensor([0, *running]).cumsum(0)


@triton.jit
def _steps_kernel(offsets_ptr, steps_ptr, T, PACKED: tl.constexpr):
    row0 = tl.program_id(0)
    tl.store(steps_ptr + row0, steps_of_tile(offsets_ptr, row0, T, PACKED))


def tiles_end_with_their_first_sequence(lengths: list[int]) -> None:
    offsets, steps = offsets_of(lengths), torch.zeros(len(lengths), dtype=torch.int32)
    for packed in (True, False):
        _steps_kernel[(len(lengths),)](offsets, steps, lengths[0], packed)
        assert steps.tolist() == (lengths if packed else [lengths[0]] * len(lengths))


def same_bits_twice(plan: LaunchPlan, *, textbook: bool) -> None:
    torch.manual_seed(0)
    inputs, cotangents = problem(4, 3, plan.D, plan.H, textbook=textbook, dtype=torch.float32)
    first, second = (run_kernels(inputs, cotangents, plan, textbook=textbook) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def an_ensemble_is_its_members(
    plan: LaunchPlan, alone: LaunchPlan, *, textbook: bool, lengths: list[int] | None
) -> None:
    """More recurrences than one launch computes, beside launches of their own: the same bits."""
    torch.manual_seed(0)
    how = {"textbook": textbook, "offsets": None if lengths is None else offsets_of(lengths)}
    inputs, cotangents = problem(3, 5, plan.D, plan.H, dtype=torch.float32, **how)
    together = run_kernels(inputs, cotangents, plan, bidirectional=True, **how)
    in_rows = {"gx", "dy", "y", "dgx"}

    def member(tensors: dict, d: int) -> dict:
        return {
            name: None if t is None else t.narrow(-2 if name in in_rows else 0, d, 2)
            for name, t in tensors.items()
        }

    for d in range(0, plan.D, 2):
        ours = {k: None if v is None else v.contiguous() for k, v in member(inputs, d).items()}
        dy = {k: v.contiguous() for k, v in member(cotangents, d).items()}
        for name, tensor in run_kernels(ours, dy, alone, bidirectional=True, **how).items():
            assert torch.equal(member(together, d)[name], tensor), name


def not_finite_stays_in_its_row(
    plan: LaunchPlan, dtype: torch.dtype, where: str, value: str, *, textbook: bool
) -> None:
    """Row 1 gets NaNs with the sentinel's own bits, or infinities; the others must not notice."""
    torch.manual_seed(0)
    inputs, cotangents = problem(4, 3, plan.D, plan.H, textbook=textbook, dtype=dtype)
    clean = run_kernels(inputs, cotangents, plan, textbook=textbook)
    poisoned = dict(inputs, **{where: inputs[where].clone()})
    row = poisoned[where][2, 1] if where == "gx" else poisoned[where][:, 1]
    if value == "nan":
        row.view(ALL_ONES[dtype]).fill_(-1)
        assert row.isnan().all()
    else:
        row[..., 0] = float("inf")
    actual = run_kernels(poisoned, cotangents, plan, textbook=textbook)
    exact, _ = yardsticks(poisoned, cotangents, textbook=textbook, reverse=False)
    if value == "nan":
        assert actual["y"][-1, 1].isnan().all() and actual["h_n"][:, 1].isnan().all()
        assert actual["dgx"][:3, 1].isnan().any()
    for name, batch_dim in (("y", 1), ("h_n", 1), ("dgx", 1), ("dh0", 1)):
        for row in (0, 2):
            assert torch.equal(
                actual[name].select(batch_dim, row), clean[name].select(batch_dim, row)
            ), f"{name}, row {row}"
        # the same elements are NaN as without padding, tiles and exchange
        assert torch.equal(actual[name].isnan(), exact[name].isnan()), name


def nan_stays_in_its_packed_sequence(plan: LaunchPlan, b: int, *, textbook: bool) -> None:
    """As above, from the initial state of a packed sequence, whichever way it is walked."""
    torch.manual_seed(0)
    lengths = [4, 3, 1]
    how = {"textbook": textbook, "offsets": offsets_of(lengths)}
    inputs, cotangents = problem(4, 3, plan.D, plan.H, dtype=torch.float32, **how)
    clean = run_kernels(inputs, cotangents, plan, **how)
    poisoned = dict(inputs, h0=inputs["h0"].clone())
    poisoned["h0"][:, b].view(torch.int32).fill_(-1)
    actual = run_kernels(poisoned, cotangents, plan, **how)
    exact, _ = yardsticks(poisoned, cotangents, **how)
    assert actual["h_n"][:, b].isnan().all()
    for other in {0, 1, 2} - {b}:
        rows = how["offsets"][: lengths[other]] + other
        for name in ("y", "dgx"):
            assert torch.equal(actual[name][rows], clean[name][rows]), name
        for name in ("h_n", "dh0"):
            assert torch.equal(actual[name][:, other], clean[name][:, other]), name
    for name in ("y", "h_n", "dgx", "dh0"):
        assert torch.equal(actual[name].isnan(), exact[name].isnan()), name


def missing_program_is_reported(plan: LaunchPlan, *, textbook: bool) -> None:
    """Without one of its programs a group gives up, says so, and yields NaN, not numbers."""
    torch.manual_seed(0)
    inputs, cotangents = problem(5, 3, plan.D, plan.H, textbook=textbook, dtype=torch.float32)
    forward._gru_forward_kernel = Concurrently(FORWARD, missing=(1, 0, 0))
    launch.wait_limit = lambda T: 100
    walk = {"textbook": textbook, "reverse": False, "bidirectional": False}
    y, _, _ = forward.gru_forward(**inputs, offsets=None, **walk, save=True, plan=plan)
    assert y[1:].isnan().all()
    for _ in range(2):  # the next launch refuses, once; then the flag is down again
        try:
            launch.raise_if_failed(y.device)
        except launch.ExchangeTimeout as error:
            assert "gave up waiting" in str(error)
            raised = True
        else:
            assert raised
            break
    else:
        raise AssertionError("the error flag stayed up")
    run_kernels(inputs, cotangents, plan, textbook=textbook)
