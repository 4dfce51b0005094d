"""Derivatives of every order and kind, and vmap, of the recurrence, dense and packed: against the
differentiable loop of the reference, which is made of torch's own operations."""

import pytest
import torch
from numerics import offsets_of
from torch.autograd import functional
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close

from trigru import ops
from trigru.accuracy import differentiate, eager_loop, problem

F64 = torch.float64
LENGTHS = [3, 2, 2]
FORMS = pytest.mark.parametrize(
    "textbook, bias",
    [(False, True), (False, False), (True, False)],
    ids=["torch", "torch, no bias", "textbook"],
)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
# Where each tensor's dimension of calls is; no weights have one, or some or all of them.
IN_DIMS = pytest.mark.parametrize(
    "in_dims",
    [(0, 0, None, None), (1, None, None, None), (0, None, 0, None), (None, 0, 0, 1), (2, 1, 2, 0)],
    ids=str,
)


@pytest.fixture(params=[1, 2], ids=["one direction", "both"])
def case(request, textbook, bias, packed):
    """(our function, the loop's, inputs), the functions of tensors alone."""
    offsets = offsets_of(LENGTHS) if packed else None
    inputs, _ = problem(2, 3, request.param, 2, textbook=textbook, dtype=F64, offsets=offsets)
    tensors = [t for t in inputs.values() if t is not None][: 4 if bias else 3]
    loop = eager_loop(textbook=textbook, reverse=False, offsets=offsets)

    def ours(gx, h0, w_hh, b_hh=None):
        return ops.recurrence(gx, h0, w_hh, b_hh, offsets, textbook=textbook)

    def theirs(gx, h0, w_hh, b_hh=None):
        return loop(gx, h0, w_hh, b_hh)

    return ours, theirs, tensors


def loss_of(function):
    return lambda *tensors: sum((k + 1) * t.sin().sum() for k, t in enumerate(function(*tensors)))


def every(tensors):
    return tuple(range(len(tensors)))


@FORMS
@PACKED
@pytest.mark.parametrize(
    "check",
    [
        lambda *args: torch.autograd.gradcheck(*args, check_forward_ad=True),
        torch.autograd.gradgradcheck,
    ],
    ids=["first", "second"],
)
def test_by_differences(case, check):
    ours, _, tensors = case
    assert check(ours, [t.requires_grad_() for t in tensors])


@FORMS
@PACKED
def test_transforms(case):
    ours, theirs, tensors = case
    for transform in (
        lambda f: grad(loss_of(f), every(tensors))(*tensors),
        lambda f: jvp(f, tuple(tensors), tuple(t.cos() for t in tensors)),
        lambda f: hessian(loss_of(f), 2)(*tensors),  # forward over reverse
        lambda f: jacrev(jacrev(loss_of(f), 2), 1)(*tensors),  # reverse over reverse
        lambda f: grad(lambda w: grad(loss_of(f), 2)(*tensors[:2], w).square().sum())(tensors[2]),
    ):
        assert_close(transform(ours), transform(theirs))


@FORMS
@PACKED
@IN_DIMS
def test_vmap(case, in_dims):
    ours, theirs, tensors = case
    in_dims = in_dims[: len(tensors)]
    batched = [
        t if d is None else torch.stack([t, t.flip(0), t.sin()], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    for transform in (
        lambda f: vmap(f, in_dims)(*batched),
        lambda f: vmap(grad(loss_of(f), every(tensors)), in_dims)(*batched),  # per sample
        lambda f: grad(loss_of(vmap(f, in_dims)), every(tensors))(*batched),
        lambda f: vmap(lambda *t: jvp(f, t, t), in_dims)(*batched),
    ):
        assert_close(transform(ours), transform(theirs))


@FORMS
@PACKED
def test_vmap_within_vmap(case):
    ours, theirs, (gx, h0, w_hh, *b_hh) = case
    gx, w_hh = torch.stack([gx, gx.sin()]), torch.stack([w_hh, w_hh.sin(), w_hh.cos()])

    def outer(function):
        samples = vmap(function, (0, None, None) + (None,) * len(b_hh))
        return vmap(samples, (None, None, 0) + (None,) * len(b_hh))(gx, h0, w_hh, *b_hh)

    assert_close(outer(ours), outer(theirs))


@pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])
@pytest.mark.parametrize("D, reverse", [(1, False), (1, True), (2, False)], ids=str)
def test_packed_sequences_are_each_computed_alone(textbook, D, reverse):
    """Of each sequence, as if there were no other: results and gradients."""
    offsets = offsets_of(LENGTHS)
    kwargs = {"textbook": textbook, "dtype": F64, "offsets": offsets}
    inputs, cotangents = problem(0, len(LENGTHS), D, 3, **kwargs)

    def alone(gx, h0, w_hh, b_hh):
        y, h_n = torch.zeros_like(gx[..., :3]), []
        for b, length in enumerate(LENGTHS):
            rows = offsets[:length] + b
            y_b, h_b = eager_loop(textbook=textbook, reverse=reverse)(
                gx[rows].unsqueeze(1), h0[:, b : b + 1], w_hh, b_hh
            )
            y = y.index_put((rows,), y_b.squeeze(1))
            h_n.append(h_b)
        return y, torch.cat(h_n, 1)

    def ours(gx, h0, w_hh, b_hh):
        return ops.recurrence(gx, h0, w_hh, b_hh, offsets, textbook=textbook, reverse=reverse)

    assert_close(differentiate(ours, inputs, cotangents), differentiate(alone, inputs, cotangents))


@FORMS
@PACKED
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "and second"])
def test_gradients_in_batches(case, create_graph):
    """All at once as one after the other: of both outputs or one, for all inputs or one, and what
    is derived from them in turn."""
    ours, _, tensors = case
    leaves = [t.requires_grad_() for t in tensors]
    y, h_n = ours(*leaves)
    dy, dh_n = (torch.randn(4, *t.shape, dtype=F64) for t in (y, h_n))
    for outputs, batch, inputs in (
        ((y, h_n), (dy, dh_n), leaves),
        ((y,), (dy,), leaves),
        ((h_n,), (dh_n[:1],), leaves),
        ((y, h_n), (dy.expand(4, *y.shape), dh_n), leaves[:1]),
        ((y,), (dy,), leaves[2:]),
    ):
        how = {"retain_graph": True, "create_graph": create_graph}
        actual = torch.autograd.grad(outputs, inputs, batch, is_grads_batched=True, **how)
        each = [
            torch.autograd.grad(outputs, inputs, one, **how) for one in zip(*batch, strict=True)
        ]
        exact = tuple(map(torch.stack, zip(*each, strict=True)))
        assert_close(actual, exact)
        if create_graph:
            second = [
                torch.autograd.grad(sum(t.sin().sum() for t in first), leaves, retain_graph=True)
                for first in (actual, exact)
            ]
            assert_close(*second)


def test_no_batches_of_batches():
    inputs, _ = problem(2, 3, 1, 2, textbook=True, dtype=F64)
    gx = inputs["gx"].requires_grad_()
    y, _ = ops.recurrence(gx, inputs["h0"], inputs["w_hh"], None, textbook=True)

    def pull(dy):
        return torch.autograd.grad(y, gx, dy, is_grads_batched=True)[0]

    with pytest.raises(NotImplementedError, match=r"under nested is_grads_batched=True: use torch"):
        torch._vmap_internals._vmap(pull)(torch.randn(2, 3, *y.shape, dtype=F64))


VECTORIZED = {
    "jacobian": lambda f, t, v: functional.jacobian(f, t, vectorize=v),
    "jacobian, forward": lambda f, t, v: functional.jacobian(
        f, t, vectorize=v, strategy="forward-mode" if v else "reverse-mode"
    ),
    "hessian": lambda f, t, v: functional.hessian(loss_of(f), t, vectorize=v),
    "hessian, forward": lambda f, t, v: functional.hessian(
        loss_of(f),
        t,
        vectorize=v,
        outer_jacobian_strategy="forward-mode" if v else "reverse-mode",
    ),
    "of the jacobian": lambda f, t, v: torch.autograd.grad(
        sum(j.sin().sum() for js in functional.jacobian(f, t, True, vectorize=v) for j in js), t
    ),
    "of the hessian": lambda f, t, v: torch.autograd.grad(
        sum(
            h.sin().sum() for hs in functional.hessian(loss_of(f), t, True, vectorize=v) for h in hs
        ),
        t,
    ),
}


@FORMS
@PACKED
@pytest.mark.parametrize("derivative", VECTORIZED)
def test_vectorized_derivatives(case, derivative):
    ours, theirs, tensors = case
    leaves = tuple(t.requires_grad_() for t in tensors[1:])  # a hessian for gx, too, takes long
    actual = VECTORIZED[derivative](lambda *t: ours(tensors[0], *t), leaves, True)
    exact = VECTORIZED[derivative](lambda *t: theirs(tensors[0], *t), leaves, False)
    assert_close(actual, exact)


def test_no_vmap_over_lengths():
    offsets = torch.stack([offsets_of(LENGTHS)] * 2)
    inputs, _ = problem(0, 3, 1, 3, textbook=True, dtype=F64, offsets=offsets[0])
    gx, h0, w_hh, _ = inputs.values()
    with pytest.raises(NotImplementedError, match="no vmap over the lengths"):
        vmap(lambda o: ops.recurrence(gx, h0, w_hh, None, o, textbook=True))(offsets)
