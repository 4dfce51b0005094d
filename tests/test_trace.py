"""The layer in TorchScript, by torch.jit.trace: what a file of it computes, as nn.GRU's does, for
any sizes. (torch.jit.script takes no TriGRU.)"""

import io

import pytest
import torch
from layers import F64, IN, STACK, H, T, make_hx, packed_case, results
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from trigru import TriGRU, gru, ops

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # nn.GRU has its share of them
]


def saved_and_loaded(model, *inputs):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, inputs), file)
    file.seek(0)
    return torch.jit.load(file)


class Packed(nn.Module):
    """A layer on the tensors of a PackedSequence, which alone can be inputs of a trace."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, data, batch_sizes, hx=None):
        output, h_n = self.layer(PackedSequence(data, batch_sizes), hx)
        return output.data, h_n


class Padded(Packed):
    def forward(self, x, lengths):
        output, h_n = self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(output)[0], h_n


@pytest.mark.parametrize("settings", [{}, STACK | {"batch_first": True}], ids=["one", "stack"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_any_sizes(form, settings, mode):
    layer = TriGRU(IN, H, **settings, dropout=0.5 if settings else 0, variant=form).eval()

    def dense(steps, count):
        return torch.randn((count, steps, IN) if layer.batch_first else (steps, count, IN))

    def packed(*batch_sizes):
        return torch.randn(sum(batch_sizes), IN), torch.tensor(batch_sizes)

    for model, *cases in (
        (layer, (dense(T, 2),), (dense(7, 2),), (dense(T, 3),), (dense(1, 1),)),
        (layer, *((dense(t, b), make_hx(layer, b)) for t, b in ((T, 2), (7, 3), (1, 1)))),
        (layer, (torch.randn(T, IN),), (torch.randn(7, IN),)),
        (Packed(layer), packed(2, 2, 1), packed(3, 2, 2, 1), packed(1)),
        (Packed(layer), *((*packed(*n), make_hx(layer, n[0])) for n in ((2, 1), (4, 3, 1)))),
    ):
        with mode():
            loaded = saved_and_loaded(model, *cases[0])
        for case in cases:
            assert_close(loaded(*case), model(*case))


def test_padded_sequences(form):
    model = Padded(TriGRU(IN, H, **STACK, variant=form))
    loaded = saved_and_loaded(model, torch.randn(T, 3, IN), torch.tensor([T, 1, 3]))
    for lengths in ([2, T + 1, 1, 3], [2, 2]):
        case = torch.randn(max(lengths), len(lengths), IN), torch.tensor(lengths)
        assert_close(loaded(*case), model(*case))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_gradients(form, mode):
    """The gates, which a trace does not save, are computed again; TorchScript optimises what is
    called a few times."""
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    with mode():
        loaded = saved_and_loaded(layer, *packed_case(layer))
    for steps, count in ((T, 2), (7, 3), (7, 3), (7, 3)):
        case = torch.randn(steps, count, IN, dtype=F64), make_hx(layer, count)
        assert_close(results(loaded, loaded, *case), results(layer, layer, *case))


def test_second_derivatives(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    x, hx = packed_case(layer)
    second = []
    for function in (saved_and_loaded(layer, x, hx), layer):
        leaves = [x.clone().requires_grad_(), hx.clone().requires_grad_(), *function.parameters()]
        y, h_n = function(*leaves[:2])
        first = torch.autograd.grad(y.sin().sum() + h_n.square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.sin().sum() for g in first), leaves))
    assert_close(*second)


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_the_recurrence_alone(variant):
    def function(gx, h0, w_hh):
        return gru(gx, h0, w_hh, variant=variant, reverse=True)

    traced = torch.jit.trace(function, (torch.randn(2, 3, 9), torch.randn(3, 3), torch.randn(9, 3)))
    case = torch.randn(4, 5, 9), torch.randn(5, 3), torch.randn(9, 3)
    assert_close(traced(*case), function(*case))


def test_sizes_that_do_not_go_together():
    """No check of the layer's is in a trace."""
    layer = TriGRU(IN, H, **STACK, variant="textbook")
    x = torch.randn(T, 2, IN)
    dense = saved_and_loaded(layer, x, make_hx(layer, 2))
    for wrong in (
        (x, make_hx(layer, 1)),
        (x[:, :1], make_hx(layer, 2)),
        (x, make_hx(layer, 2)[:2]),
    ):
        with pytest.raises(RuntimeError, match=r"gx \(4, .*\) and h0 \(.*\) do not go together"):
            dense(*wrong)
    data, batch_sizes, hx = torch.randn(5, IN), torch.tensor([2, 2, 1]), make_hx(layer, 2)
    packed = saved_and_loaded(Packed(layer), data, batch_sizes, hx)
    for wrong in (
        (data[:4], batch_sizes, hx),
        (torch.randn(6, IN), batch_sizes, hx),
        (data, batch_sizes, make_hx(layer, 3)),
        (data[:1], batch_sizes, hx),  # which could broadcast
        (data, batch_sizes, make_hx(layer, 1)),
    ):
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            packed(*wrong)


@pytest.mark.parametrize("exported", [False, True])
def test_no_tangent_is_lost(exported):
    """The operator in a graph has no forward-mode derivative, and must not pass for a constant."""
    layer, x = TriGRU(IN, H, variant="textbook"), torch.randn(T, 2, IN)
    graph = torch.export.export(layer, (x,)).module() if exported else torch.jit.trace(layer, (x,))
    with pytest.raises(RuntimeError, match="differentiate the model itself"):
        torch.func.jvp(lambda x: graph(x)[0], (x,), (x,))
    assert torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))[1].any()
