"""Layers and calls for the tests of nn.GRU's contract, and what each of them has to compute."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule
from torch.func import (
    functional_call,
)
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
)
from torch.testing import assert_close

from trigru import TriGRU, ops

BF16, FP16, FP32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
IN, H, T, B = 5, 6, 4, 4
LENGTHS = (2, 1, 4, 2)
STACK = {"num_layers": 2, "bidirectional": True}  # every kind of weight there is
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
VARIANT = pytest.mark.parametrize("variant", ops.VARIANTS)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
PRECISION = pytest.mark.parametrize("dtype", [FP32, F64], ids=["fp32", "fp64"])
ALL_SETTINGS = [
    dict(zip(("num_layers", "bidirectional", "batch_first", "bias"), values, strict=True))
    for values in itertools.product((1, 2), (False, True), (False, True), (True, False))
]
SETTINGS = pytest.mark.parametrize(
    "settings", ALL_SETTINGS, ids=lambda settings: "-".join(map(str, settings.values()))
)


def believing_in_kernels():
    return SimpleNamespace(**vars(ops) | {"why_no_kernel": lambda *args: None})


def by_hand(layer, weights, x, hx=None, *, resets=None, update_scale=None):
    """Either equation, written down once more, over x (T, …, I) from hx (layers · D, …, H), with
    resets (T, …, D) and update_scale (T, …, H or 1): the library has no part in it, and every
    transform of torch.func knows all that it is made of."""
    D, reset_state = 2 if layer.bidirectional else 1, weights.get("reset_state")
    if hx is None:
        hx = x.new_zeros(layer.num_layers * D, *x.shape[1:-1], layer.hidden_size)
        if reset_state is not None:
            hx = hx + (reset_state if x.dim() == 2 else reset_state.unsqueeze(1))
    h_n = []
    for k in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(("", "_reverse")[:D]):
            w_ih, w_hh, b_ih, b_hh = (weights.get(f"{kind}_l{k}{suffix}") for kind in KINDS)
            w_hh = dense(w_hh)
            reset = 0.0 if reset_state is None else reset_state[k * D + d]
            h, y = hx[k * D + d], {}
            for t in range(len(x))[:: -1 if d else 1]:
                if resets is not None:
                    h = torch.where(resets[t][..., d : d + 1], reset, h)
                gx_r, gx_z, gx_n = F.linear(x[t], w_ih, b_ih).chunk(3, -1)
                gh_r, gh_z, gh_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
                r, z = torch.sigmoid(gx_r + gh_r), torch.sigmoid(gx_z + gh_z)
                if layer.variant == "textbook":
                    n = torch.tanh(gx_n + F.linear(r * h, w_hh.chunk(3)[2]))
                    share = z
                else:
                    n = torch.tanh(gx_n + r * gh_n)
                    share = 1 - z
                if update_scale is not None:
                    share = update_scale[t] * share
                h = (1 - share) * h + share * n
                if layer.clip is not None:
                    h = h.clamp(-layer.clip, layer.clip)
                y[t] = h
            outputs.append(torch.stack([y[t] for t in range(len(x))]))
            h_n.append(h)
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n)


def dense(w_hh):
    """(3H, H) of U's blocks (heads, 3H / heads, H / heads): each gate of each head, put where its
    rows and columns are."""
    if w_hh.dim() == 2:
        return w_hh
    heads, _, width = w_hh.shape
    gates = w_hh.unflatten(1, (3, width))
    rows = [
        F.pad(gates[k, gate], (k * width, (heads - 1 - k) * width))
        for gate in range(3)
        for k in range(heads)
    ]
    return torch.cat(rows)


def packed_by_hand(layer, weights, packed, hx=None):
    """Each sequence alone, in the order in which its user knows it."""
    starts = [0, *packed.batch_sizes.cumsum(0).tolist()]
    places = range(int(packed.batch_sizes[0]))
    if packed.unsorted_indices is not None:
        places = packed.unsorted_indices.tolist()
    outputs, h_n = {}, []
    for b, place in enumerate(places):
        length = int((packed.batch_sizes > place).sum())
        rows = [starts[t] + place for t in range(length)]
        y, h = by_hand(layer, weights, packed.data[rows], None if hx is None else hx[:, b])
        outputs.update(zip(rows, y, strict=True))
        h_n.append(h)
    data = torch.stack([outputs[row] for row in range(len(packed.data))])
    return packed._replace(data=data), torch.stack(h_n, 1)


def textbook(layer, weights, x, hx=None):
    """The textbook form of what nn.GRU accepts."""
    if isinstance(x, PackedSequence):
        return packed_by_hand(layer, weights, x, hx)
    flip = layer.batch_first and x.dim() == 3
    y, h_n = by_hand(layer, weights, x.transpose(0, 1) if flip else x, hx)
    return y.transpose(0, 1) if flip else y, h_n


def expected(layer, *, dtype=None):
    """What `layer` promises to compute, as a function of (x, hx) on its own parameters: nn.GRU, or
    the textbook form by hand, in `dtype` throughout where one is given."""
    theirs = layer.to_torch() if layer.variant == "torch" else None

    def function(x, hx=None):
        weights = dict(layer.named_parameters())
        if dtype is not None:
            weights = {name: p.to(dtype) for name, p in weights.items()}
            x, hx = x.to(dtype), None if hx is None else hx.to(dtype)
        if theirs is None:
            return textbook(layer, weights, x, hx)
        return functional_call(theirs, weights, (x, hx))

    return function


def as_it_is(x):
    return x


def data_of(output):
    return output.data if isinstance(output, PackedSequence) else output


def results(function, layer, x, hx=None, *, arrange=as_it_is):
    """Outputs and all gradients of `function(arrange(x), hx)`, for random dy and dh_n that are the
    same in every call."""
    leaves = {"dx": x.detach().clone().requires_grad_(), **dict(layer.named_parameters())}
    if hx is not None:
        leaves["dhx"] = hx = hx.detach().clone().requires_grad_()
    output, h_n = function(arrange(leaves["dx"]), hx)
    generator = torch.Generator().manual_seed(1)
    outputs = data_of(output), h_n
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    named = dict(zip(leaves, grads, strict=True))
    return {"output": outputs[0].detach(), "h_n": h_n.detach(), **named}


def in_double(layer, *tensors):
    return copy.deepcopy(layer).double(), *(None if t is None else t.double() for t in tensors)


def make_hx(layer, *lead):
    D = 2 if layer.bidirectional else 1
    shape = layer.num_layers * D, *lead, layer.hidden_size
    return torch.randn(shape, dtype=layer.weight_ih_l0.dtype)


def assert_all_within_rule(triples):
    """The rule over many small results, (actual, exact, yardstick) each, at once, a kind of result
    at a time: over each tensor alone the largest error would be luck. Scaled by powers of two,
    which rounds nothing, all are about 1 at most."""
    pooled = [{}, {}, {}]
    for triple in triples:
        for name, exact in triple[1].items():
            kind = name.split("_l")[0]
            scale = 2.0 ** -math.frexp(exact.abs().max().item() if exact.numel() else 0)[1]
            for into, each in zip(pooled, triple, strict=True):
                assert each[name].shape == exact.shape, name
                into.setdefault(kind, []).append((each[name] * scale).flatten())
    assert_within_rule(*({kind: torch.cat(ts) for kind, ts in into.items()} for into in pooled))


def pack(lengths, **how):
    """As a function of padded (T, B, I)."""
    lead = 1 if how.get("batch_first") else 0

    def arrange(x):
        x = x[: max(lengths), : len(lengths)].transpose(0, lead)
        return pack_padded_sequence(x, torch.tensor(lengths), **how)

    return arrange


def pack_each(x):
    return pack_sequence([x[:n, b] for b, n in enumerate(LENGTHS)], enforce_sorted=False)


def pack_rows_with_gaps(x):
    packed = pack(LENGTHS, enforce_sorted=False)(x)
    return packed._replace(data=torch.stack((packed.data, packed.data), -1)[..., 0])


PACKINGS = {
    "sorted": pack((4, 2, 2, 1)),
    "sorted, not enforced": pack((4, 2, 2, 1), enforce_sorted=False),
    "unsorted": pack(LENGTHS, enforce_sorted=False),
    "unsorted, batch first": pack(LENGTHS, enforce_sorted=False, batch_first=True),
    "a cycle": pack((2, 1, 3), enforce_sorted=False),  # a permutation that is not its own inverse
    "of a list": pack_each,
    "rows with gaps": pack_rows_with_gaps,
    "equal": pack((3, 3, 3), enforce_sorted=False),
    "one step": pack((1, 1, 1)),
    "one sequence": pack((3,)),
    "one step of one": pack((1,), enforce_sorted=False),
}
unsorted = PACKINGS["unsorted"]


def packed_case(layer, arrange=unsorted):
    """x (T, B, I), and hx for as many sequences as `arrange` takes of it."""
    x = torch.randn(T, B, layer.input_size, dtype=layer.weight_ih_l0.dtype)
    return x, make_hx(layer, int(arrange(x).batch_sizes[0]))


def assert_same_packing(actual, exact):
    assert type(actual) is type(exact) is PackedSequence
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        ours, theirs = getattr(actual, name), getattr(exact, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert_close(ours, theirs, rtol=0, atol=0)


class WrongGradient(TriGRU):
    def forward(self, x, hx=None):
        y, h_n = super().forward(x, hx)
        return y + 2 * (y.detach() - y), h_n  # its sign


class Diverges(TriGRU):
    def forward(self, x, hx=None):
        y, h_n = super().forward(x, hx)
        return y * math.inf, h_n
