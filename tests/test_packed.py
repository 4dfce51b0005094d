"""Packed sequences, in and out, beside nn.GRU's and beside each sequence alone."""

import itertools

import pytest
import torch
from layers import (
    ALL_SETTINGS,
    BF16,
    BIAS,
    F64,
    FP16,
    FP32,
    IN,
    PACKINGS,
    STACK,
    B,
    H,
    T,
    assert_same_packing,
    by_hand,
    expected,
    in_double,
    make_hx,
    pack,
    packed_by_hand,
    packed_case,
    results,
    unsorted,
)
from numerics import assert_within_rule
from torch import nn
from torch.func import (
    functional_call,
)
from torch.nn.utils.rnn import (
    pad_packed_sequence,
)
from torch.testing import assert_close

from trigru import TriGRU


@pytest.mark.parametrize(
    "settings, packing, with_hx",
    [
        *itertools.product(ALL_SETTINGS, ("unsorted",), (True,)),
        *itertools.product(ALL_SETTINGS, ("sorted",), (False,)),
        *itertools.product((STACK,), PACKINGS, (True,)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_packed(form, settings, packing, with_hx):
    layer, arrange = TriGRU(IN, H, **settings, variant=form, dtype=F64), PACKINGS[packing]
    x, hx = packed_case(layer, arrange)
    if not with_hx:
        hx = None
    actual = results(layer, layer, x, hx, arrange=arrange)
    assert_close(actual, results(expected(layer), layer, x, hx, arrange=arrange))
    theirs = nn.GRU(IN, H, **settings, dtype=F64)
    assert_same_packing(layer(arrange(x), hx)[0], theirs(arrange(x), hx)[0])


@BIAS
def test_by_hand_is_nn_gru(bias):
    """What the textbook form and the transforms are measured by, in the form that nn.GRU has."""
    layer = TriGRU(IN, H, **STACK, bias=bias, dtype=F64)
    weights, theirs = dict(layer.named_parameters()), layer.to_torch()
    x, hx = packed_case(layer)
    assert_close(by_hand(layer, weights, x, hx), theirs(x, hx))
    actual, exact = packed_by_hand(layer, weights, unsorted(x), hx), theirs(unsorted(x), hx)
    assert_close((actual[0].data, actual[1]), (exact[0].data, exact[1]))
    assert_same_packing(actual[0], exact[0])


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_packed_in_other_dtypes(form, dtype):
    """At a size at which the largest error over a tensor is more than luck."""
    layer = TriGRU(24, 24, bidirectional=True, variant=form, dtype=dtype)
    arrange = pack(torch.randint(1, 5, (20,)).tolist(), enforce_sorted=False)
    x, hx = torch.randn(4, 20, 24, dtype=dtype), make_hx(layer, 20)
    double, *doubles = in_double(layer, x, hx)
    assert_within_rule(
        results(layer, layer, x, hx, arrange=arrange),
        results(expected(double), double, *doubles, arrange=arrange),
        results(expected(layer), layer, x, hx, arrange=arrange),
    )


@pytest.mark.parametrize("with_hx", [True, False], ids=["hx", ""])
def test_packed_under_autocast(form, with_hx):
    layer = TriGRU(24, 16, bidirectional=True, variant=form)
    arrange = pack(torch.randint(1, 5, (20,)).tolist(), enforce_sorted=False)
    x, hx = torch.randn(4, 20, 24), make_hx(layer, 20) if with_hx else None

    def under_autocast(packed, hx):
        with torch.autocast("cpu", BF16):
            output, h_n = layer(packed, hx)
        assert output.data.dtype == h_n.dtype == BF16
        return output, h_n

    double, *doubles = in_double(layer, x, hx)
    exact = results(expected(double), double, *doubles, arrange=arrange)
    yardstick = results(expected(layer, dtype=BF16), layer, x, hx, arrange=arrange)
    actual = results(under_autocast, layer, x, hx, arrange=arrange)
    assert all(t.dtype == FP32 for name, t in actual.items() if name[0] in "dwb")
    # Every gradient was a number of bfloat16 before it became one of float32.
    actual, yardstick = ({k: v.to(BF16) for k, v in r.items()} for r in (actual, yardstick))
    assert_within_rule(actual, exact, yardstick)


def test_packed_backward_in_eval_mode(form):
    layer = TriGRU(IN, H, **STACK, dropout=0.5, variant=form, dtype=F64).eval()
    case = packed_case(layer)
    actual = results(layer, layer, *case, arrange=unsorted)
    assert_close(actual, results(expected(layer), layer, *case, arrange=unsorted))


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_packed_without_gradients(form, mode):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    x, hx = packed_case(layer)
    with mode():
        output, h_n = layer(unsorted(x), hx)
    assert not output.data.requires_grad and not h_n.requires_grad
    exact, exact_h_n = expected(layer)(unsorted(x), hx)
    assert_close((output.data, h_n), (exact.data.detach(), exact_h_n.detach()))


USES = {
    "output": lambda output, h_n: output.data.sum(),
    "h_n": lambda output, h_n: h_n.square().sum(),
    "first row": lambda output, h_n: output.data[0].sum(),
    "padded": lambda output, h_n: pad_packed_sequence(output)[0].square().sum(),
}


@pytest.mark.parametrize("use", USES)
def test_packed_with_only_some_results_in_the_loss(form, use):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    case, grads = packed_case(layer), []
    for function in (layer, expected(layer)):
        x, hx = (t.clone().requires_grad_() for t in case)
        loss = USES[use](*function(unsorted(x), hx))
        wanted = [x, hx, *layer.parameters()]
        grads.append(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    assert_close(*grads)


def test_packed_double_backward(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    case, seconds = packed_case(layer), []
    for function in (layer, expected(layer)):
        x, hx = (t.clone().requires_grad_() for t in case)
        output, h_n = function(unsorted(x), hx)
        loss, leaves = output.data.square().sum() + h_n.sin().sum(), [x, hx, *layer.parameters()]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_close(*seconds)


def test_packed_dropout(form):
    layer = TriGRU(IN, H, num_layers=3, dropout=0.5, bidirectional=True, variant=form, dtype=F64)
    packed = unsorted(packed_case(layer)[0])
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(packed)[0].data)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    layer.eval()
    assert_close(layer(packed)[0].data, expected(layer)(packed)[0].data)
    assert not torch.equal(layer(packed)[0].data, outputs[0])


def test_packed_dropout_of_everything(form):
    """The upper layer then reads zeros; its own output is not dropped."""
    layer = TriGRU(IN, H, num_layers=2, dropout=1.0, variant=form, dtype=F64)
    upper = TriGRU(H, H, variant=form, dtype=F64)
    weights = {n: p for n, p in layer.state_dict().items() if n.endswith("_l1")}
    upper.load_state_dict({n.replace("_l1", "_l0"): p for n, p in weights.items()})
    output, h_n = layer(unsorted(packed_case(layer)[0]))
    exact, exact_h_n = expected(upper)(unsorted(torch.zeros(T, B, H, dtype=F64)))
    assert_close((output.data, h_n[1:]), (exact.data, exact_h_n))


def test_packed_of_equal_lengths_is_dense(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    x, hx = packed_case(layer)
    output, h_n = layer(pack((T,) * B)(x), hx)
    assert_close((pad_packed_sequence(output)[0], h_n), layer(x, hx))


def test_packed_through_several_layers(form):
    """What comes out goes in again, with its order."""
    lower, upper = (TriGRU(size, H, variant=form, dtype=F64) for size in (IN, H))
    packed = unsorted(packed_case(lower)[0])
    actual, exact = upper(*lower(packed)), expected(upper)(*expected(lower)(packed))
    assert_same_packing(actual[0], exact[0])
    assert_close((actual[0].data, actual[1]), (exact[0].data, exact[1]))


def test_packed_input_stays_as_it_is(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    x, hx = packed_case(layer)
    packed = unsorted(x)
    before = [tensor.clone() for tensor in (*packed, hx)]
    layer(packed, hx)
    assert_close([*packed, hx], before, rtol=0, atol=0)


def test_packed_with_other_weights(form):
    layer, other = (TriGRU(IN, H, **STACK, variant=form, dtype=F64) for _ in range(2))
    x, hx = packed_case(layer)
    actual = functional_call(layer, dict(other.named_parameters()), (unsorted(x), hx))
    exact = expected(other)(unsorted(x), hx)
    assert_close((actual[0].data, actual[1]), (exact[0].data, exact[1]))
    wanted = list(other.parameters())
    assert_close(*(torch.autograd.grad(y.data.sum(), wanted) for y, _ in (actual, exact)))
