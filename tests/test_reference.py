"""The plain torch reference in float64: against nn.GRU, the published cell, and autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from trigru import gru, reference
from trigru.accuracy import differentiate, eager_loop, problem

F64 = torch.float64
VARIANTS = pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])
DIRECTIONS = pytest.mark.parametrize(
    "D, reverse", [(1, False), (1, True), (2, False)], ids=["forwards", "backwards", "both"]
)
SHAPES = pytest.mark.parametrize(
    "T, B, H", [(1, 1, 1), (1, 4, 3), (5, 1, 7), (4, 3, 1), (6, 3, 8)], ids=str
)


@SHAPES
@DIRECTIONS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_torch_form_is_nn_gru(T, B, H, D, reverse, bias):
    layer = nn.GRU(5, H, bias=bias, bidirectional=D == 2, dtype=F64)
    x = torch.randn(T, B, 5, dtype=F64, requires_grad=True)
    h0 = torch.randn(D, B, H, dtype=F64, requires_grad=True)

    def theirs():
        y, h_n = layer(x.flip(0) if reverse else x, h0)
        return y.flip(0) if reverse else y, h_n

    def ours():
        w = [[p.unsqueeze(0) for p in weights] for weights in layer.all_weights]
        w_ih, w_hh, *biases = (torch.cat(kind) for kind in zip(*w, strict=True))
        b_ih, b_hh = biases if bias else (torch.zeros(D, 3 * H, dtype=F64), None)
        gx = torch.stack([F.linear(x, w_ih[d], b_ih[d]) for d in range(D)], 2)
        y, h_n, _ = reference.gru_forward(
            gx, h0, w_hh, b_hh, None, textbook=False, reverse=reverse, bidirectional=D == 2
        )
        return y.flatten(2), h_n

    leaves = [x, h0, *layer.parameters()]
    cotangents = torch.randn(T, B, D * H, dtype=F64), torch.randn(D, B, H, dtype=F64)
    expected, actual = theirs(), ours()
    assert_close(actual, expected)
    assert_close(
        torch.autograd.grad(actual, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
    )


def published_textbook(gx, h, U):
    """One sequence, one direction, as Chung et al. 2014 write it: gx is W x + b, (T, 3H)."""
    H = h.shape[0]
    U_r, U_z, U = U[:H], U[H : 2 * H], U[2 * H :]
    states = []
    for W_r_x, W_z_x, W_x in zip(gx[:, :H], gx[:, H : 2 * H], gx[:, 2 * H :], strict=True):
        r = 1 / (1 + torch.exp(-(W_r_x + U_r @ h)))
        z = 1 / (1 + torch.exp(-(W_z_x + U_z @ h)))
        candidate = torch.tanh(W_x + U @ (r * h))
        h = (1 - z) * h + z * candidate
        states.append(h)
    return torch.stack(states)


@SHAPES
@DIRECTIONS
def test_textbook_form_is_the_published_one(T, B, H, D, reverse):
    def published(gx, h0, w_hh, b_hh):
        y = torch.empty(T, B, D, H, dtype=F64)
        h_n = torch.empty(D, B, H, dtype=F64)
        for d in range(D):
            steps = range(T - 1, -1, -1) if reverse or d == 1 else range(T)
            for b in range(B):
                states = published_textbook(gx[list(steps), b, d], h0[d, b], w_hh[d])
                y[list(steps), b, d] = states
                h_n[d, b] = states[-1]
        return y, h_n

    inputs, cotangents = problem(T, B, D, H, textbook=True, dtype=F64)
    ours = eager_loop(textbook=True, reverse=reverse)
    assert_close(
        differentiate(ours, inputs, cotangents), differentiate(published, inputs, cotangents)
    )


@VARIANTS
@DIRECTIONS
@pytest.mark.parametrize("T, B, H", [(1, 1, 1), (1, 3, 5), (6, 1, 4), (5, 4, 7)], ids=str)
@pytest.mark.parametrize("from_gates", [False, True], ids=["", "and from the gates"])
def test_walk_back_is_autograd_of_the_loop(T, B, H, D, reverse, textbook, from_gates):
    inputs, cotangents = problem(T, B, D, H, textbook=textbook, dtype=F64)
    leaves = {k: v.requires_grad_() for k, v in inputs.items() if v is not None}
    walk = {"reverse": reverse, "bidirectional": D == 2}
    y, h_n, gates = reference.gru_forward(**inputs, offsets=None, textbook=textbook, **walk)
    assert gates.shape == (T, B, D, 3 if textbook else 4, H)
    dgates = torch.randn_like(gates) if from_gates else None
    outputs, gradients = [y, h_n], [*cotangents.values()]
    if from_gates:
        outputs, gradients = [*outputs, gates], [*gradients, dgates]
    exact = torch.autograd.grad(outputs, [*leaves.values()], gradients)

    h0, w_hh, y, gates = (t.detach() for t in (inputs["h0"], inputs["w_hh"], y, gates))
    dgx, dgh, dh0, *others = reference.gru_backward(
        **cotangents, h0=h0, w_hh=w_hh, y=y, gates=gates, offsets=None,
        textbook=textbook, **walk, dgates=dgates,
    )  # fmt: skip
    assert [t.shape for t in others] == [(0,), (0,)]
    if textbook:
        assert dgh.shape == (0,)
        dgh = dgx
    before = reference.states_before(y, h0, None, **walk)
    reset = gates[..., 0, :] * before
    operands = [before, before, reset if textbook else before]  # of U_r, U_z and U_n
    dw_hh = torch.cat(
        [
            torch.einsum("tbdg,tbdh->dgh", part, operand)
            for part, operand in zip(dgh.chunk(3, -1), operands, strict=True)
        ],
        dim=1,
    )
    actual = (dgx, dh0, dw_hh) if textbook else (dgx, dh0, dw_hh, dgh.sum((0, 1)))
    assert_close(actual, exact)


@pytest.mark.parametrize(
    "variant, bias", [("torch", True), ("torch", False), ("textbook", False)], ids=str
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"]
)
def test_derivatives_by_differences(check, variant, bias, reverse):
    T, B, H = 3, 2, 2
    shapes = [(T, B, 3 * H), (B, H), (3 * H, H)] + [(3 * H,)] * bias
    inputs = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    assert check(lambda *tensors: gru(*tensors, variant=variant, reverse=reverse), inputs)


@DIRECTIONS
@pytest.mark.parametrize("T", [1, 2, 4])
def test_states_before(T, D, reverse):
    B, H = 2, 3
    y, h0 = torch.randn(T, B, D, H), torch.randn(D, B, H)
    before = reference.states_before(y, h0, None, reverse=reverse, bidirectional=D == 2)
    assert before.shape == y.shape
    for d in range(D):
        walk = list(range(T))[:: -1 if reverse or d == 1 else 1]
        assert torch.equal(before[walk[0], :, d], h0[d])
        for earlier, later in itertools.pairwise(walk):
            assert torch.equal(before[later, :, d], y[earlier, :, d])


@VARIANTS
@DIRECTIONS
def test_each_step_starts_from_the_state_before(D, reverse, textbook):
    inputs, _ = problem(4, 3, D, 5, textbook=textbook, dtype=F64)
    gx, h0, w_hh, b_hh = inputs.values()
    walk = {"reverse": reverse, "bidirectional": D == 2}
    y, h_n, _ = reference.gru_forward(gx, h0, w_hh, b_hh, None, textbook=textbook, **walk)
    before = reference.states_before(y, h0, None, **walk).movedim(2, 1)  # (T, D, B, H)
    for t in range(4):
        _, h, _ = reference.gru_forward(
            gx[t : t + 1], before[t], w_hh, b_hh, None, textbook=textbook, **walk
        )
        assert_close(h, y[t].transpose(0, 1))
    for d in range(D):
        assert torch.equal(h_n[d], y[0 if reverse or d == 1 else -1, :, d])
