"""What a sequence may have besides its steps: resets, update_scale, clip, heads, and documents back
to back. Beside sequences that are really cut, a loop by hand, and published equations."""

import copy
import itertools
import pickle

import pytest
import torch
from layers import (
    ALL_SETTINGS,
    BF16,
    F64,
    FP16,
    FP32,
    IN,
    KINDS,
    SETTINGS,
    STACK,
    VARIANT,
    H,
    by_hand,
    data_of,
    in_double,
    make_hx,
    results,
)
from numerics import assert_within_rule
from torch import fx, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close

from trigru import TriGRU, gru, ops, resets_from_cu_seqlens

T = 4
ENDS = (T, 2, 3, T)  # how long each row is, where they are packed
RESETS = torch.tensor(  # a row for each kind of mask: both ends; all; apart; consecutive
    [[1, 0, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]], dtype=torch.bool
).T  # (T, B)
B = RESETS.shape[1]
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Settings that nn.GRU does not have, and whether hx is given.
OPTIONS = [
    ({}, False),
    ({"heads": 2, "learn_reset": True}, True),
    ({"learn_reset": True, "clip": 0.4}, False),
    ({"heads": 3, "clip": 0.4}, True),
]


def drawn(**settings):
    """A layer whose gates all matter, and its reset state."""
    layer = TriGRU(IN, H, dtype=F64, **settings)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return layer


def directions(layer):
    return 2 if layer.bidirectional else 1


def by_direction(layer, resets):
    """(T, B, D), whichever way they were given."""
    D = directions(layer)
    return resets if resets.dim() == 3 else resets.unsqueeze(-1).expand(*resets.shape, D)


# Resets cut


def in_pieces(layer, rows, hx, masks):
    """Each layer and direction of each row, (n, I), cut where its mask, (n, D), says, and every
    piece run alone by a layer of one direction: y of each row, (n, D · H), and h_n."""
    weights, D, h_n = dict(layer.named_parameters()), directions(layer), []
    for k in range(layer.num_layers):
        one = TriGRU(
            rows[0].shape[1], H, bias=layer.bias, variant=layer.variant, heads=layer.heads,
            clip=layer.clip, dtype=F64,
        )  # fmt: skip
        columns = []
        for d, suffix in enumerate(("", "_reverse")[:D]):
            own = {f"{kind}_l0": weights.get(f"{kind}_l{k}{suffix}") for kind in KINDS}
            own = {name: weight for name, weight in own.items() if weight is not None}
            i = k * D + d
            start = layer.reset_state[i] if layer.learn_reset else torch.zeros(H, dtype=F64)
            walks = [
                walk_in_pieces(one, own, x, start if hx is None else hx[i, b], start, mask[:, d], d)
                for b, (x, mask) in enumerate(zip(rows, masks, strict=True))
            ]
            columns.append([y for y, _ in walks])
            h_n.append(torch.stack([h for _, h in walks]))
        rows = [torch.cat(each, -1) for each in zip(*columns, strict=True)]
    return rows, torch.stack(h_n)


def walk_in_pieces(one, weights, x, h, start, mask, backwards):
    if backwards:
        x, mask = x.flip(0), mask.flip(0)
    inner = [t for t in range(1, len(x)) if mask[t]]
    pieces = []
    for first, end in itertools.pairwise([0, *inner, len(x)]):
        h = start if mask[first] else h
        y, h = functional_call(one, weights, (x[first:end], h.unsqueeze(0)))
        h = h.squeeze(0)
        pieces.append(y)
    y = torch.cat(pieces)
    return (y.flip(0) if backwards else y), h


def rows_of(tensor, ends):
    return [tensor[:end, b] for b, end in enumerate(ends)]


def unbatched(layer, x, hx, resets):
    calls = [
        layer(x[:, b], None if hx is None else hx[:, b], resets=resets[:, b]) for b in range(B)
    ]
    outputs, h_n = zip(*calls, strict=True)
    return torch.cat(outputs), torch.stack(h_n, 1)


def batched(layer, x, hx, resets):
    if layer.batch_first:
        x, resets = x.transpose(0, 1), resets.transpose(0, 1)
    output, h_n = layer(x, hx, resets=resets)
    if layer.batch_first:
        output = output.transpose(0, 1)
    return output.transpose(0, 1).flatten(0, 1), h_n


def packed(layer, x, hx, resets):
    """The output's rows in the order of `rows_of`."""
    x, resets = (pack_sequence(rows_of(t, ENDS), enforce_sorted=False) for t in (x, resets))
    output, h_n = layer(x, hx, resets=resets)
    data, _ = layer(x, hx, resets=resets.data)
    assert_close(output.data, data.data, rtol=0, atol=0)
    rows = pack_sequence(rows_of(place(ENDS), ENDS), enforce_sorted=False).data
    return output.data[rows.argsort()], h_n


def place(ends):
    """(T, B): where each step's row is among those of `rows_of`."""
    starts = torch.tensor([0, *ends[:-1]]).cumsum(0)
    return torch.arange(T).unsqueeze(1) + starts


LAYOUTS = {"batched": batched, "unbatched": unbatched, "packed": packed}


# Every combination of the settings, each in one layout, with the same resets in both directions or
# with others.
CUTS = [
    (settings | {"variant": variant} | options, with_hx, *how)
    for (settings, variant, (options, with_hx)), how in zip(
        itertools.product(ALL_SETTINGS, ops.VARIANTS, OPTIONS),
        itertools.cycle(itertools.product(LAYOUTS, ["shared", "own"])),
        strict=False,
    )
]


@pytest.mark.parametrize("settings, with_hx, layout, masks", CUTS, ids=str)
def test_resets_cut_a_sequence(settings, with_hx, layout, masks):
    """Values and all gradients."""
    layer = drawn(**settings)
    x, hx = torch.randn(T, B, IN, dtype=F64), make_hx(layer, B) if with_hx else None
    resets = RESETS
    if layer.bidirectional and masks == "own":
        resets = torch.stack((RESETS, RESETS.roll(1, 1)), -1)  # (T, B, 2)
    ends = ENDS if layout == "packed" else (T,) * B

    def pieces(x, hx):
        each = rows_of(by_direction(layer, resets), ends)
        rows, h_n = in_pieces(layer, rows_of(x, ends), hx, each)
        return torch.cat(rows), h_n

    def whole(x, hx):
        return LAYOUTS[layout](layer, x, hx, resets)

    assert_close(results(whole, layer, x, hx), results(pieces, layer, x, hx), **EXACT)


def derivatives(function, tensors, *, second=False):
    """Outputs and gradients of `function(**tensors)`, None among them left alone, for cotangents
    that are the same in every call; and the gradients of the sum of the gradients' squares."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items() if t is not None}
    outputs = function(**tensors | leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    first = torch.autograd.grad(outputs, [*leaves.values()], cotangents, create_graph=second)
    found = {f"d{name}": g.detach() for name, g in zip(leaves, first, strict=True)}
    if second:
        squares = sum(g.square().sum() for g in first)
        again = torch.autograd.grad(squares, [*leaves.values()])
        found |= {f"dd{name}": g for name, g in zip(leaves, again, strict=True)}
    return found | {f"output {k}": t.detach() for k, t in enumerate(outputs)}


POISON = pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)


@VARIANT
@POISON
@pytest.mark.parametrize("learn_reset", [False, True], ids=["zeros", "learned"])
@pytest.mark.parametrize("first", ["bad", "good"])
def test_nothing_crosses_a_reset(variant, poison, learn_reset, first):
    """Two parts of a sequence, in the bad one of which no number is one: the good one is as if it
    were alone, in values and gradients, whichever direction comes from the bad one."""
    layer = drawn(**STACK, variant=variant, learn_reset=learn_reset)
    parts = slice(None, 2), slice(2, None)
    (bad, good), into_bad = (parts, 0) if first == "bad" else (parts[::-1], 1)
    x, hx = torch.randn(5, B, IN, dtype=F64), make_hx(layer, B)
    resets = torch.zeros(5, B, 2, dtype=torch.bool)
    resets[2, :, 0] = resets[1, :, 1] = True
    reset_state = layer.reset_state.unsqueeze(1) if learn_reset else torch.zeros(4, 1, H)
    alone = x[good].clone(), hx.clone()
    alone[1][into_bad::2] = reset_state[into_bad::2].detach()
    x[bad] = poison
    hx[into_bad::2] = poison

    def gradients(outputs, inputs):
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator, dtype=F64) for t in outputs]
        return torch.autograd.grad(outputs, inputs, cotangents)

    inputs, inputs_alone = ([t.requires_grad_() for t in each] for each in ((x, hx), alone))
    y, h_n = layer(*inputs, resets=resets)
    y_alone, h_n_alone = layer(*inputs_alone)
    outputs = y[good], h_n[into_bad::2]  # this direction begins in the bad part and ends here
    outputs_alone = y_alone, h_n_alone[into_bad::2]
    assert_close(outputs, outputs_alone, **EXACT)
    dx, dhx = gradients(outputs, inputs)
    dx_alone, dhx_alone = gradients(outputs_alone, inputs_alone)
    into_good = slice(1 - into_bad, None, 2)
    assert_close(dx[good], dx_alone, **EXACT)
    assert_close(dhx[into_good], dhx_alone[into_good], **EXACT)


# Everything at once


@SETTINGS
@VARIANT
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("per_unit", [False, True], ids=["a step", "a unit"])
def test_by_hand(settings, variant, heads, per_unit):
    """Heads, resets, a learned reset state, update_scale and clip: values and all gradients."""
    layer = drawn(**settings, variant=variant, heads=heads, learn_reset=True, clip=0.5)
    resets = torch.rand(T, B, directions(layer)) < 0.3
    resets = resets if layer.bidirectional else resets[..., 0]
    update_scale = 2 * torch.rand(T, B, H, dtype=F64)
    if not per_unit:
        update_scale = update_scale[..., 0]
    given = {"x": torch.randn(T, B, IN, dtype=F64), "hx": make_hx(layer, B)}
    given |= {"update_scale": update_scale, **dict(layer.named_parameters())}

    def ours(x, hx, update_scale, **weights):
        modifiers = {"resets": resets, "update_scale": update_scale}
        if layer.batch_first:
            x, *each = (t.transpose(0, 1) for t in (x, *modifiers.values()))
            modifiers = dict(zip(modifiers, each, strict=True))
        output, h_n = functional_call(layer, weights, (x, hx), modifiers)
        return output.transpose(0, 1) if layer.batch_first else output, h_n

    def theirs(x, hx, update_scale, **weights):
        scale = update_scale if per_unit else update_scale.unsqueeze(-1)
        masks = by_direction(layer, resets)
        return by_hand(layer, weights, x, hx, resets=masks, update_scale=scale)

    assert_close(derivatives(ours, given), derivatives(theirs, given), **EXACT)


@VARIANT
@pytest.mark.parametrize("T, B", [(1, 1), (1, 3), (3, 0)], ids=str)
def test_edges(variant, T, B):
    layer = drawn(**STACK, **EVERYTHING, variant=variant)
    x, hx, given = torch.randn(T, B, IN, dtype=F64), make_hx(layer, B), modifiers(T, B)
    weights = dict(layer.named_parameters())
    actual, exact = (
        results(f, layer, x, hx)
        for f in (
            lambda x, hx: layer(x, hx, **given),
            lambda x, hx: by_hand(layer, weights, x, hx, **given),
        )
    )
    assert_close(actual, exact, **EXACT)


@VARIANT
def test_masks_with_gaps(variant):
    """Resets and scales that are one for all rows, or in another order in memory."""
    layer = drawn(**STACK, variant=variant)
    x, scale = torch.randn(T, B, IN, dtype=F64), torch.rand(T, 1, dtype=F64)
    for resets in (RESETS, RESETS[:, :1].expand(T, B), RESETS.T.contiguous().T):
        whole = {"resets": resets.contiguous(), "update_scale": scale.repeat(1, B)}
        actual = layer(x, resets=resets, update_scale=scale.expand(T, B))
        assert_close(actual, layer(x, **whole), rtol=0, atol=0)


def test_without_hx_a_learned_reset_state_is_the_initial_one():
    layer = drawn(**STACK, learn_reset=True, heads=2)
    x = torch.randn(T, B, IN, dtype=F64)
    hx = layer.reset_state.unsqueeze(1).expand(-1, B, -1)
    ends = tuple(rows_of(x, ENDS))
    for given in (x, pack_sequence(ends, enforce_sorted=False)):
        (y, h_n), (exact, exact_h_n) = layer(given), layer(given, hx)
        assert_close((data_of(y), h_n), (data_of(exact), exact_h_n), rtol=0, atol=0)
    assert_close(layer(x[:, 0]), layer(x[:, 0], layer.reset_state), rtol=0, atol=0)
    layer(x)[0].square().sum().backward()
    assert layer.reset_state.grad.all()


# The recurrence alone


def loop(variant, reverse, resets, clip):
    """`gru`, step by step."""

    def function(gx, h0, w_hh, b_hh=None, reset_state=None, update_scale=None):
        u_r, u_z, u_n = w_hh.chunk(3)
        b_r, b_z, b_n = (0.0, 0.0, 0.0) if b_hh is None else b_hh.chunk(3)
        h, y = h0, {}
        for t in range(len(gx))[:: -1 if reverse else 1]:
            if resets is not None:
                start = torch.zeros_like(h) if reset_state is None else reset_state
                h = torch.where(resets[t].unsqueeze(-1), start, h)
            gx_r, gx_z, gx_n = gx[t].chunk(3, -1)
            r = torch.sigmoid(gx_r + h @ u_r.T + b_r)
            z = torch.sigmoid(gx_z + h @ u_z.T + b_z)
            scale = torch.ones(()) if update_scale is None else update_scale[t]
            if scale.dim() == 1:
                scale = scale.unsqueeze(-1)
            if variant == "textbook":
                n = torch.tanh(gx_n + (r * h) @ u_n.T)
                h = h + scale * z * (n - h)
            else:
                n = torch.tanh(gx_n + r * (h @ u_n.T + b_n))
                h = h + scale * (1 - z) * (n - h)
            h = h if clip is None else h.clamp(-clip, clip)
            y[t] = h
        return torch.stack([y[t] for t in range(len(gx))]), h

    return function


def recurrence_case(variant, start, scale_shape):
    """What `gru` takes, but the resets, and these."""
    tensors = {
        "gx": torch.randn(T, B, 3 * H, dtype=F64),
        "h0": torch.randn(B, H, dtype=F64),
        "w_hh": torch.randn(3 * H, H, dtype=F64),
        "b_hh": torch.randn(3 * H, dtype=F64) if variant == "torch" else None,
        "reset_state": torch.randn(H, dtype=F64) if start == "learned" else None,
        "update_scale": None if scale_shape is None else torch.randn(scale_shape, dtype=F64),
    }
    return tensors, None if start is None else RESETS


@VARIANT
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("start", [None, "zeros", "learned"])
@pytest.mark.parametrize("scale", [None, (T, B), (T, B, H)], ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_recurrence_alone(variant, reverse, start, scale, clip):
    """Values, first and second derivatives."""
    tensors, resets = recurrence_case(variant, start, scale)

    def ours(**tensors):
        return gru(**tensors, variant=variant, reverse=reverse, resets=resets, clip=clip)

    theirs = loop(variant, reverse, resets, clip)
    assert_close(
        derivatives(ours, tensors, second=True),
        derivatives(theirs, tensors, second=True),
        rtol=1e-8,
        atol=1e-10,
    )


# Published cells


def sigmoid(a):
    return 1 / (1 + torch.exp(-a))


@pytest.mark.parametrize("per_unit", [False, True], ids=["a step", "a unit"])
def test_augru_of_dien(per_unit):
    """arXiv:1809.03672, "GRU with attentional update gate" and the equations of its GRU. Its r
    stands before the product, as in the torch form, whose z is 1 − u."""
    given = {f"W_{gate}": torch.randn(H, IN, dtype=F64) for gate in "ruh"}
    given |= {f"U_{gate}": torch.randn(H, H, dtype=F64) for gate in "ruh"}
    given |= {f"b_{gate}": torch.randn(H, dtype=F64) for gate in "ruh"}
    given |= {"i": torch.randn(T, B, IN, dtype=F64), "h": torch.randn(B, H, dtype=F64)}
    given["a"] = torch.rand((T, B, H) if per_unit else (T, B), dtype=F64)
    layer = TriGRU(IN, H, dtype=F64)

    def published(i, h, a, **p):
        y = []
        for t in range(T):
            u = sigmoid(i[t] @ p["W_u"].T + h @ p["U_u"].T + p["b_u"])
            r = sigmoid(i[t] @ p["W_r"].T + h @ p["U_r"].T + p["b_r"])
            h_tilde = torch.tanh(i[t] @ p["W_h"].T + r * (h @ p["U_h"].T) + p["b_h"])
            u_tilde = (a[t] if per_unit else a[t].unsqueeze(-1)) * u
            h = (1 - u_tilde) * h + u_tilde * h_tilde
            y.append(h)
        return torch.stack(y), h

    def ours(i, h, a, **p):
        w_ih, w_hh, b_ih = (torch.cat((p[f"{k}_r"], -p[f"{k}_u"], p[f"{k}_h"])) for k in "WUb")
        weights = {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh, "bias_ih_l0": b_ih}
        weights["bias_hh_l0"] = torch.zeros_like(b_ih)
        y, h_n = functional_call(layer, weights, (i, h.unsqueeze(0)), {"update_scale": a})
        return y, h_n.squeeze(0)

    assert_close(derivatives(ours, given), derivatives(published, given), **EXACT)


def test_the_clipped_cell_of_lfads():
    """Pandarinath et al. 2018, `GRU` of its code: the gates of [x, h] together, a bias that keeps
    the state, r before the product, and the new state clipped. 1 − u is the textbook form's z."""
    given = {
        "W_ru": torch.randn(IN + H, 2 * H, dtype=F64),
        "b_ru": torch.randn(2 * H, dtype=F64),
        "W_c": torch.randn(IN + H, H, dtype=F64),
        "b_c": torch.randn(H, dtype=F64),
        "x": torch.randn(8, B, IN, dtype=F64),
        "h": torch.randn(B, H, dtype=F64),
    }
    clip, clipped = 0.6, []
    layer = TriGRU(IN, H, variant="textbook", clip=clip, dtype=F64)

    def published(x, h, W_ru, b_ru, W_c, b_c):
        y = []
        for x_t in x:
            r, u = (torch.cat((x_t, h), 1) @ W_ru + b_ru).chunk(2, 1)
            r, u = sigmoid(r), sigmoid(u + 1.0)
            c = torch.tanh(torch.cat((x_t, r * h), 1) @ W_c + b_c)
            h = u * h + (1 - u) * c
            clipped.append((h.abs() > clip).double().mean().item())
            h = torch.clamp(h, -clip, clip)
            y.append(h)
        return torch.stack(y), h

    def ours(x, h, W_ru, b_ru, W_c, b_c):
        (W_r, W_u), (b_r, b_u) = W_ru.T.chunk(2), b_ru.chunk(2)
        w_ih, w_hh = torch.cat((W_r, -W_u, W_c.T)).split((IN, H), 1)
        b_ih = torch.cat((b_r, -(b_u + 1.0), b_c))
        weights = {"weight_ih_l0": w_ih, "weight_hh_l0": w_hh, "bias_ih_l0": b_ih}
        y, h_n = functional_call(layer, weights, (x, h.unsqueeze(0)))
        return y, h_n.squeeze(0)

    assert_close(derivatives(ours, given), derivatives(published, given), **EXACT)
    assert 0.1 < sum(clipped) / len(clipped) < 0.9


@VARIANT
def test_a_mask_of_zoneout(variant):
    """arXiv:1606.01305: a unit keeps its state where the mask is 0, and nothing passes there."""
    layer = drawn(variant=variant)
    mask = (torch.rand(T, B, H) < 0.5).to(F64)
    given = {"x": torch.randn(T, B, IN, dtype=F64), "h": torch.randn(1, B, H, dtype=F64)}

    def published(x, h):
        y = []
        for t in range(T):
            _, new = layer(x[t : t + 1], h)
            h = torch.where(mask[t] == 1, new, h)
            y.append(h[0])
        return torch.stack(y), h

    def ours(x, h):
        return layer(x, h, update_scale=mask)

    assert_close(derivatives(ours, given), derivatives(published, given), **EXACT)


@VARIANT
@pytest.mark.parametrize("clip", [1.0, float("inf"), None], ids=str)
def test_what_changes_nothing(variant, clip):
    """No reset, a scale of 1, a limit that a state below 1 does not get to."""
    layer = drawn(**STACK, variant=variant)
    same = TriGRU(IN, H, **STACK, variant=variant, clip=clip, dtype=F64)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, IN, dtype=F64)
    none = torch.zeros(T, B, dtype=torch.bool)
    assert_close(same(x, resets=none, update_scale=torch.ones(T, B, dtype=F64)), layer(x))


# Documents back to back


DOCUMENTS = {
    "several": [0, 3, 5, 9],
    "one": [0, 9],
    "of one step": [0, 1, 2, 8, 9],
    "empty, first": [0, 0, 0, 4, 9],
    "empty, last": [0, 4, 9, 9, 9],
    "empty, within": [0, 4, 4, 4, 9],
}


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_resets_of_documents(documents, dtype, bidirectional):
    cu_seqlens = DOCUMENTS[documents]
    resets = resets_from_cu_seqlens(
        torch.tensor(cu_seqlens, dtype=dtype), 9, bidirectional=bidirectional
    )
    parts = [(first, end) for first, end in itertools.pairwise(cu_seqlens) if first < end]
    begins = [t in {first for first, _ in parts} for t in range(9)]
    ends = [t + 1 in {end for _, end in parts} for t in range(9)]
    exact = list(map(list, zip(begins, ends, strict=True))) if bidirectional else begins
    assert resets.dtype == torch.bool and resets.tolist() == exact


def test_no_documents():
    assert resets_from_cu_seqlens(torch.tensor([0]), 0).shape == (0,)
    assert resets_from_cu_seqlens(torch.tensor([0, 0]), 0, bidirectional=True).shape == (0, 2)


@VARIANT
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize("settings", [{}, STACK], ids=["one", "stack"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_each_document_is_computed_alone(variant, batch_first, settings, documents):
    """Unbatched and as a batch of one, with and without a learned state; and all gradients."""
    layer = drawn(**settings, variant=variant, batch_first=batch_first, learn_reset=batch_first)
    cu_seqlens = torch.tensor(DOCUMENTS[documents])
    resets = resets_from_cu_seqlens(cu_seqlens, 9, bidirectional=layer.bidirectional)
    given = {"x": torch.randn(9, IN, dtype=F64), **dict(layer.named_parameters())}

    def unbatched(x, **weights):
        return (functional_call(layer, weights, (x,), {"resets": resets})[0],)

    def batch_of_one(x, **weights):
        b = 0 if batch_first else 1
        kwargs = {"resets": resets.unsqueeze(b)}
        return (functional_call(layer, weights, (x.unsqueeze(b),), kwargs)[0].squeeze(b),)

    def alone(x, **weights):
        parts = [x[i:j] for i, j in itertools.pairwise(cu_seqlens.tolist()) if i < j]
        return (torch.cat([functional_call(layer, weights, (part,))[0] for part in parts]),)

    exact = derivatives(alone, given)
    assert_close(derivatives(unbatched, given), exact, **EXACT)
    assert_close(derivatives(batch_of_one, given), exact, **EXACT)


@pytest.mark.parametrize(
    "cu_seqlens, error, text",
    [
        ([0, 3, 9], TypeError, "cu_seqlens must be a tensor, got list"),
        (torch.tensor([0.0, 9.0]), TypeError, r"of torch.int32 or int64, got torch.float32"),
        (torch.tensor([0, 9], dtype=torch.int16), TypeError, r"int32 or int64, got torch.int16"),
        (torch.tensor([[0, 9]]), ValueError, r"must have shape \(S \+ 1,\), got \(1, 2\)"),
        (torch.tensor(9), ValueError, r"must have shape \(S \+ 1,\), got \(\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"shape \(S \+ 1,\), got \(0,\)"),
        (torch.tensor([1, 9]), ValueError, r"begin with 0.*T = 9, got \[1, 9\]"),
        (torch.tensor([0, 5, 4, 9]), ValueError, r"never decrease.*got \[0, 5, 4, 9\]"),
        (torch.tensor([0, 8]), ValueError, r"end with T = 9, got \[0, 8\]"),
        (torch.tensor([0, 10]), ValueError, r"end with T = 9, got \[0, 10\]"),
        (torch.tensor([0]), ValueError, r"end with T = 9, got \[0\]"),
    ],
    ids=str,
)
def test_what_are_no_cu_seqlens(cu_seqlens, error, text):
    with pytest.raises(error, match=text):
        resets_from_cu_seqlens(cu_seqlens, 9)


# Whatever calls the layer


EVERYTHING = {"heads": 2, "learn_reset": True, "clip": 0.5}


def modifiers(*lead):
    """resets of two directions and update_scale for x (*lead, I)."""
    return {
        "resets": torch.rand(*lead, 2) < 0.4,
        "update_scale": 2 * torch.rand(*lead, H, dtype=F64),
    }


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@VARIANT
def test_compiled(fresh_dynamo, variant):
    """In one graph, of which the resets and scales are data."""
    layer = drawn(**STACK, **EVERYTHING, variant=variant)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    stance = "default"
    for _ in range(2):
        given = modifiers(T, B)
        x, hx = torch.randn(T, B, IN, dtype=F64), make_hx(layer, B)
        with torch.compiler.set_stance(stance):
            actual = results(lambda x, hx, g=given: compiled(x, hx, **g), layer, x, hx)
        assert_close(actual, results(lambda x, hx, g=given: layer(x, hx, **g), layer, x, hx))
        stance = "fail_on_recompile"


@VARIANT
def test_compiled_recurrence(fresh_dynamo, variant):
    """`gru`, and with it a learned state that no hx replaces."""
    tensors, resets = recurrence_case(variant, "learned", (T, B))

    def function(**tensors):
        return gru(**tensors, variant=variant, resets=resets, clip=0.5)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(derivatives(compiled, tensors), derivatives(function, tensors))
    layer = drawn(**EVERYTHING, variant=variant)
    x = torch.randn(T, B, IN, dtype=F64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, exact = (
        results(lambda x, hx, f=f: f(x, resets=RESETS), layer, x) for f in (compiled, layer)
    )
    assert_close(actual, exact)


def test_compiled_documents(fresh_dynamo):
    """From the places where they begin to the last state, in one graph; wrong places are found."""
    layer = drawn(bidirectional=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, cu_seqlens):
        resets = resets_from_cu_seqlens(cu_seqlens, len(x), bidirectional=True)
        return layer(x, resets=resets)

    x = torch.randn(9, IN, dtype=F64)
    stance = "default"
    for documents in ([0, 3, 5, 9], [0, 0, 8, 9]):
        cu_seqlens = torch.tensor(documents)
        resets = resets_from_cu_seqlens(cu_seqlens, 9, bidirectional=True)
        with torch.compiler.set_stance(stance):
            assert_close(compiled(x, cu_seqlens), layer(x, resets=resets))
        stance = "fail_on_recompile"
    with pytest.raises(RuntimeError, match="cu_seqlens must begin with 0, never decrease and end"):
        compiled(x, torch.tensor([0, 5, 3, 9]))
    with torch.compiler.set_stance("default"):  # another T, which is a symbol from now on
        cu_seqlens = torch.tensor([0, 2, 2, 7])
        resets = resets_from_cu_seqlens(cu_seqlens, 7, bidirectional=True)
        assert_close(compiled(x[:7], cu_seqlens), layer(x[:7], resets=resets))


@VARIANT
def test_autocast(variant):
    """At a size at which the largest error over a tensor is more than luck; without a clip, which
    lets the gradient of a state pass or not, as its last bit is."""
    layer = TriGRU(24, 24, bidirectional=True, variant=variant, heads=2, learn_reset=True)
    torch.nn.init.normal_(layer.reset_state)
    x, hx = torch.randn(5, 20, 24), make_hx(layer, 20)
    resets, update_scale = torch.rand(5, 20, 2) < 0.3, torch.rand(5, 20, 24)
    given = {"resets": resets, "update_scale": update_scale}

    def under_autocast(x, hx):
        with torch.autocast("cpu", BF16):
            y, h_n = layer(x, hx, **given)
        assert y.dtype == h_n.dtype == BF16
        return y, h_n

    def hand(layer, dtype):
        def function(x, hx):
            weights = {name: p.to(dtype) for name, p in layer.named_parameters()}
            scale = update_scale.to(dtype)
            return by_hand(
                layer, weights, x.to(dtype), hx.to(dtype), resets=resets, update_scale=scale
            )

        return function

    double, *doubles = in_double(layer, x, hx)
    exact = results(hand(double, F64), double, *doubles)
    yardstick = results(hand(layer, BF16), layer, x, hx)
    actual = results(under_autocast, layer, x, hx)
    assert all(t.dtype == torch.float32 for name, t in actual.items() if name[0] in "dwbr")
    actual, yardstick = ({k: v.to(BF16) for k, v in r.items()} for r in (actual, yardstick))
    assert_within_rule(actual, exact, yardstick)


@VARIANT
@pytest.mark.parametrize("dtype, clip", [(BF16, 0.7), (FP16, 0.2), (FP32, 0.7)], ids=str)
def test_a_limit_of_the_tensors_dtype(variant, dtype, clip):
    """It is the dtype's nearest number, here below what was given, and no gradient passes there."""
    layer = TriGRU(IN, H, variant=variant, clip=clip, dtype=dtype)
    x = (10 * torch.randn(T, B, IN)).to(dtype).requires_grad_()
    y, _ = layer(x)
    limit = torch.tensor(clip, dtype=dtype)
    assert limit.double() < clip
    at_limit = y.abs() == limit
    assert y.abs().max() == limit and 0 < at_limit.sum() < y.numel()
    (dx,) = torch.autograd.grad((y * at_limit).sum(), x)
    assert not dx.any()


class Case:
    """A layer with everything, as a function (weights, x, hx, resets, update_scale) in two ways."""

    def __init__(self, variant):
        self.layers = [
            TriGRU(2, 4, **STACK, **EVERYTHING, variant=variant, dtype=F64) for _ in range(3)
        ]
        for layer in self.layers:
            torch.nn.init.normal_(layer.reset_state)
        self.layer = self.layers[0]
        self.w = {name: p.detach() for name, p in self.layer.named_parameters()}
        self.ws = {name: p.detach() for name, p in stack_module_state(self.layers)[0].items()}
        self.x, self.hx = torch.randn(3, 2, 2, dtype=F64), torch.randn(4, 2, 4, dtype=F64)
        self.resets, self.scale = torch.rand(3, 2, 2) < 0.4, torch.rand(3, 2, 4, dtype=F64)
        self.xs, self.scales = torch.randn(3, 3, 2, 2, dtype=F64), torch.rand(3, 3, 2, 4, dtype=F64)
        self.masks = torch.rand(3, 3, 2, 2) < 0.4
        self.start = torch.randn(3, 4, 4, dtype=F64)

    def ours(self, w, x, hx, resets, scale):
        return functional_call(self.layer, w, (x, hx), {"resets": resets, "update_scale": scale})

    def theirs(self, w, x, hx, resets, scale):
        return by_hand(self.layer, w, x, hx, resets=resets, update_scale=scale)


def loss(f):
    def function(*args):
        y, h_n = f(*args)
        return y.square().sum() + h_n.sin().sum()

    return function


TRANSFORMS = {
    "vmap of x and resets": lambda f, c: vmap(f, (None, 0, None, 0, None))(
        c.w, c.xs, c.hx, c.masks, c.scale
    ),
    "vmap of resets": lambda f, c: vmap(f, (None, None, None, 2, None))(
        c.w, c.x, c.hx, c.masks.movedim(0, 2), c.scale
    ),
    "vmap of update_scale": lambda f, c: vmap(f, (None, None, None, None, 1))(
        c.w, c.x, c.hx, c.resets, c.scales.movedim(0, 1)
    ),
    "vmap of reset_state": lambda f, c: vmap(
        lambda s: f(c.w | {"reset_state": s}, c.x, c.hx, c.resets, c.scale)
    )(c.start),
    "vmap of rows": lambda f, c: vmap(f, (None, 1, 1, 1, 1))(c.w, c.x, c.hx, c.resets, c.scale),
    "vmap of a weight": lambda f, c: vmap(
        lambda u: f(c.w | {"weight_hh_l1": u}, c.x, c.hx, c.resets, c.scale)
    )(c.ws["weight_hh_l1"]),
    "an ensemble": lambda f, c: vmap(f, (0, 0, None, 0, 0))(c.ws, c.xs, c.hx, c.masks, c.scales),
    "an ensemble without hx": lambda f, c: vmap(lambda w, r: f(w, c.x, None, r, c.scale))(
        c.ws, c.masks
    ),
    "an ensemble of one mask": lambda f, c: vmap(f, (0, None, None, None, None))(
        c.ws, c.x, c.hx, c.resets, c.scale
    ),
    "gradients of a sample": lambda f, c: vmap(grad(loss(f)), (None, 0, None, 0, 0))(
        c.w, c.xs, c.hx, c.masks, c.scales
    ),
    "gradients of a member": lambda f, c: vmap(grad(loss(f), (0, 4)), (0, None, None, 0, None))(
        c.ws, c.x, c.hx, c.masks, c.scale
    ),
    "gradient of gradient": lambda f, c: grad(
        lambda s: grad(loss(f), 4)(c.w, c.x, c.hx, c.resets, s).square().sum()
    )(c.scale),
    "jvp": lambda f, c: jvp(
        lambda w, x, s: f(w, x, c.hx, c.resets, s), (c.w, c.x, c.scale), (c.w, c.xs[0], c.scale)
    ),
    "jacrev": lambda f, c: jacrev(f, (2, 4))(c.w, c.x, c.hx, c.resets, c.scale),
    "hessian": lambda f, c: hessian(
        lambda s: loss(f)(c.w | {"reset_state": s}, c.x, c.hx, c.resets, c.scale)
    )(c.w["reset_state"]),
}


@VARIANT
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(variant, transform):
    case = Case(variant)
    actual, exact = (TRANSFORMS[transform](f, case) for f in (case.ours, case.theirs))
    assert_close(actual, exact)


@VARIANT
def test_gradients_in_batches(variant):
    """By torch.autograd's own vmap, as one after the other."""
    layer = drawn(**STACK, **EVERYTHING, variant=variant)
    x, hx, given = torch.randn(T, B, IN, dtype=F64), make_hx(layer, B), modifiers(T, B)
    inputs = [t.requires_grad_() for t in (x, hx, given["update_scale"])]
    outputs = layer(x, hx, **given)
    inputs += layer.parameters()
    batch = [torch.randn(3, *t.shape, dtype=F64) for t in outputs]
    how = {"retain_graph": True}
    actual = torch.autograd.grad(outputs, inputs, batch, is_grads_batched=True, **how)
    each = [torch.autograd.grad(outputs, inputs, one, **how) for one in zip(*batch, strict=True)]
    assert_close(actual, tuple(map(torch.stack, zip(*each, strict=True))))


@VARIANT
def test_transforms_of_packed_sequences(variant):
    """Rows and their resets together, beside one after the other."""
    layer = drawn(**STACK, **EVERYTHING, variant=variant)
    packed = pack_sequence(rows_of(torch.randn(T, B, IN, dtype=F64), ENDS), enforce_sorted=False)
    N = len(packed.data)
    datas, given = torch.randn(3, N, IN, dtype=F64), modifiers(3, N)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def call(weights, data, resets, update_scale):
        given = {"resets": resets, "update_scale": update_scale}
        output, h_n = functional_call(layer, weights, (packed._replace(data=data),), given)
        return output.data.square().sum() + h_n.sin().sum()

    each = datas, given["resets"], given["update_scale"]
    for function in (call, grad(call), grad(call, 3)):
        actual = vmap(function, (None, 0, 0, 0))(weights, *each)
        exact = [function(weights, *one) for one in zip(*each, strict=True)]
        assert_close(actual, torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *exact))


@pytest.mark.parametrize("variant, strict", [("torch", True), ("textbook", False)], ids=str)
def test_export(fresh_dynamo, variant, strict):
    """What is exported takes other resets, and any T and B."""
    layer = drawn(**STACK, **EVERYTHING, variant=variant)
    steps, count = torch.export.Dim("steps"), torch.export.Dim("count")
    dims = {name: {0: steps, 1: count} for name in ("input", "resets", "update_scale")}
    program = torch.export.export(
        layer, (torch.randn(T, B, IN, dtype=F64),), modifiers(T, B), dynamic_shapes=dims,
        strict=strict,
    )  # fmt: skip
    for sizes in ((T, B), (7, 3)):
        x, given = torch.randn(*sizes, IN, dtype=F64), modifiers(*sizes)
        assert_close(program.module()(x, **given), layer(x, **given))


class Traced(nn.Module):
    """A layer by position, as torch.jit.trace calls it."""

    def __init__(self, layer, batch_sizes=False):
        super().__init__()
        self.layer, self.batch_sizes = layer, batch_sizes

    def forward(self, x, resets, update_scale, batch_sizes=None):
        given = {"resets": resets, "update_scale": update_scale}
        if batch_sizes is None:
            return self.layer(x, **given)
        output, h_n = self.layer(PackedSequence(x, batch_sizes), **given)
        return output.data, h_n


@VARIANT
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced(variant, batch_first):
    """As with torch.export, and gradients through what was traced."""
    layer = drawn(**STACK, **EVERYTHING, variant=variant, batch_first=batch_first)
    model = Traced(layer)

    def case(*lead):
        return torch.randn(*lead, IN, dtype=F64), *modifiers(*lead).values()

    traced = torch.jit.trace(model, case(T, B))
    for lead in ((T, B), (7, 3), (1, 1)):
        x, resets, update_scale = case(*lead)
        actual, exact = (
            results(lambda x, hx, f=f, r=resets, s=update_scale: f(x, r, s), f, x)
            for f in (traced, model)
        )
        assert_close(actual, exact)
    traced = torch.jit.trace(model, case(T))
    assert_close(traced(*(unbatched := case(7))), model(*unbatched))
    traced = torch.jit.trace(model, (*case(5), torch.tensor([3, 2])))
    packed = *case(7), torch.tensor([4, 2, 1])
    assert_close(traced(*packed), model(*packed))


@VARIANT
def test_a_leaf_of_torch_fx(variant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = drawn(**STACK, **EVERYTHING, variant=variant)

        def forward(self, x, done, attention):
            y, h_n = self.gru(x, resets=done > 0, update_scale=attention)
            return y.sum(-1), h_n

    model = Model()
    traced = fx.symbolic_trace(model)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [set(call.kwargs) for call in calls] == [{"resets", "update_scale"}]
    x, done = torch.randn(T, B, IN, dtype=F64), (torch.rand(T, B) < 0.3).float()
    attention = torch.rand(T, B, dtype=F64)
    assert_close(traced(x, done, attention), model(x, done, attention))


# As any other module


def test_parameters():
    layer = TriGRU(IN, H, **STACK, heads=3, learn_reset=True)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    names = [name for name, _ in nn.GRU(IN, H, **STACK).named_parameters()]
    assert list(shapes) == [*names, "reset_state"]
    width = H // 3
    for name, shape in shapes.items():
        if name.startswith("weight_hh"):
            assert shape == (3, 3 * width, width)
    assert shapes["weight_ih_l1"] == (3 * H, 2 * H) and shapes["reset_state"] == (4, H)
    assert not layer.reset_state.any()
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7)
    layer.reset_parameters()
    assert not layer.reset_state.any()
    for name, p in layer.named_parameters():  # U's blocks as those of a GRU of their size
        limit = width**-0.5 if name.startswith("weight_hh") else H**-0.5
        if name != "reset_state":
            assert 0.8 * limit < p.abs().max() <= limit, name


def test_repr():
    assert repr(TriGRU(IN, H, **EVERYTHING)) == (
        f"TriGRU({IN}, {H}, heads=2, learn_reset=True, clip=0.5)"
    )
    assert repr(TriGRU(IN, H)) == f"TriGRU({IN}, {H})"


@VARIANT
@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(variant, make):
    layer = drawn(**STACK, **EVERYTHING, variant=variant)
    other = make(layer)
    assert repr(other) == repr(layer)
    x, hx, given = torch.randn(T, B, IN, dtype=F64), make_hx(layer, B), modifiers(T, B)
    actual, exact = (
        results(lambda x, hx, f=f: f(x, hx, **given), f, x, hx) for f in (other, layer)
    )
    assert_close(actual, exact, rtol=0, atol=0)
    with torch.no_grad():
        other.reset_state.zero_()
    assert layer.reset_state.all()


@VARIANT
def test_checkpoints(variant):
    source, target = (drawn(**STACK, **EVERYTHING, variant=variant) for _ in range(2))
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert_close(dict(target.named_parameters()), dict(source.named_parameters()), rtol=0, atol=0)
    x, given = torch.randn(T, B, IN, dtype=F64), modifiers(T, B)
    assert_close(target(x, **given), source(x, **given), rtol=0, atol=0)
    for settings, text in (
        ({"learn_reset": True}, "size mismatch for weight_hh_l0"),
        ({"heads": 3, "learn_reset": True}, "size mismatch for weight_hh_l0"),
        ({"heads": 2}, r'Unexpected key\(s\) in state_dict: "reset_state"'),
    ):
        other = TriGRU(IN, H, **STACK, **settings, variant=variant, dtype=F64)
        with pytest.raises(RuntimeError, match=text):
            other.load_state_dict(source.state_dict())
    plain = TriGRU(IN, H, **STACK, heads=2, variant=variant, dtype=F64)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "reset_state"'):
        source.load_state_dict(plain.state_dict())


def test_from_the_meta_device():
    source = drawn(**STACK, **EVERYTHING)
    layer = TriGRU(IN, H, **STACK, **EVERYTHING, dtype=F64, device="meta")
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x, given = torch.randn(T, B, IN, dtype=F64), modifiers(T, B)
    assert_close(layer(x, **given), source(x, **given), rtol=0, atol=0)
    given = {name: each.to("meta") for name, each in given.items()}
    y, h_n = layer.to("meta")(x.to("meta"), **given)
    assert y.is_meta and (y.shape, h_n.shape) == ((T, B, 2 * H), (4, B, H))


def test_a_layer_of_an_older_file():
    """From before there were heads, reset states and clips."""
    layer = drawn(**STACK)
    state = layer.__getstate__()
    for name in ("heads", "learn_reset", "clip"):
        del state[name]
    old = TriGRU.__new__(TriGRU)
    old.__setstate__(pickle.loads(pickle.dumps(state)))
    assert repr(old) == repr(layer)
    x, given = torch.randn(T, B, IN, dtype=F64), modifiers(T, B)
    assert_close(old(x), layer(x), rtol=0, atol=0)
    assert_close(old(x, **given), layer(x, **given), rtol=0, atol=0)
    old.reset_parameters()
    old.to_torch()


# Bad input


@pytest.mark.parametrize(
    "settings, error, text",
    [
        ({"heads": 4}, ValueError, r"heads must divide hidden_size 6, got 4"),
        ({"heads": 0}, ValueError, r"heads must divide hidden_size 6, got 0"),
        ({"heads": -2}, ValueError, r"heads must divide hidden_size 6, got -2"),
        ({"heads": 7}, ValueError, r"heads must divide hidden_size 6, got 7"),
        ({"heads": 2.0}, TypeError, r"heads must be an int, got float"),
        ({"heads": True}, TypeError, r"heads must be an int, got bool"),
        ({"heads": "2"}, TypeError, r"heads must be an int, got str"),
        ({"heads": None}, TypeError, r"heads must be an int, got NoneType"),
        ({"learn_reset": 1}, TypeError, r"learn_reset must be a bool, got int"),
        ({"learn_reset": None}, TypeError, r"learn_reset must be a bool, got NoneType"),
        ({"clip": 0}, ValueError, r"clip must be above 0, got 0"),
        ({"clip": -0.5}, ValueError, r"clip must be above 0, got -0.5"),
        ({"clip": float("nan")}, ValueError, r"clip must be above 0, got nan"),
        ({"clip": True}, TypeError, r"clip must be a number or None, got bool"),
        ({"clip": "1"}, TypeError, r"clip must be a number or None, got str"),
        ({"clip": torch.tensor(1.0)}, TypeError, r"clip must be a number or None, got Tensor"),
    ],
    ids=str,
)
@VARIANT
def test_bad_settings(variant, settings, error, text):
    with pytest.raises(error, match=text):
        TriGRU(IN, H, variant=variant, **settings)


def bools(*shape, **how):
    return torch.zeros(shape, dtype=torch.bool, **how)


def packed_as(sizes, *shape, **how):
    return PackedSequence(bools(sum(sizes), *shape), torch.tensor(sizes), **how)


SHAPE = r"must have shape \(4, 3\)"
BAD_MODIFIERS = {  # what the layer is, its input, what is given, and what is said
    "resets of no dimension": ({}, (4, 3), {"resets": bools()}, ValueError, SHAPE + r", got \(\)"),
    "resets of other steps": ({}, (4, 3), {"resets": bools(5, 3)}, ValueError, SHAPE),
    "resets of other rows": ({}, (4, 3), {"resets": bools(4, 1)}, ValueError, SHAPE),
    "resets, batch first": (
        {"batch_first": True}, (4, 3), {"resets": bools(3, 4)}, ValueError, SHAPE,
    ),
    "resets of two for one direction": ({}, (4, 3), {"resets": bools(4, 3, 2)}, ValueError, SHAPE),
    "resets of three for two directions": (
        {"bidirectional": True}, (4, 3), {"resets": bools(4, 3, 3)}, ValueError,
        SHAPE + r" or \(4, 3, 2\), got \(4, 3, 3\)",
    ),
    "resets of a batch for none": (
        {}, (4,), {"resets": bools(4, 1)}, ValueError, r"must have shape \(4,\), got \(4, 1\)",
    ),
    "resets of int64": (
        {}, (4, 3), {"resets": bools(4, 3).long()}, TypeError,
        r"resets must be of torch.bool, got torch.int64",
    ),
    "resets of float32": (
        {}, (4, 3), {"resets": bools(4, 3).float()}, TypeError,
        r"resets must be of torch.bool, got torch.float32",
    ),
    "resets in a list": (
        {}, (4, 3), {"resets": [[True] * 3] * 4}, TypeError, r"resets must be a tensor, got list",
    ),
    "resets packed": (
        {}, (4, 3), {"resets": packed_as([3, 3, 3, 3])}, TypeError,
        r"resets must be a tensor, got PackedSequence",
    ),
    "resets on another device": (
        {}, (4, 3), {"resets": bools(4, 3, device="meta")}, ValueError,
        r"resets must be on cpu, as the input is, got meta",
    ),
    "scale of other steps": ({}, (4, 3), {"update_scale": torch.ones(5, 3)}, ValueError, SHAPE),
    "scale of one unit": (
        {}, (4, 3), {"update_scale": torch.ones(4, 3, 1)}, ValueError,
        r"update_scale must have shape \(4, 3\) or \(4, 3, 6\), got \(4, 3, 1\)",
    ),
    "scale of both directions": (
        {"bidirectional": True}, (4, 3), {"update_scale": torch.ones(4, 3, 12)}, ValueError, SHAPE,
    ),
    "a number": (
        {}, (4, 3), {"update_scale": 0.5}, TypeError, "update_scale must be a tensor, got float",
    ),
    "scale of bool": (
        {}, (4, 3), {"update_scale": bools(4, 3)}, TypeError,
        r"update_scale must be of a floating dtype, got torch.bool",
    ),
    "scale of float64": (
        {}, (4, 3), {"update_scale": torch.ones(4, 3, dtype=F64)}, TypeError,
        r"update_scale must be of torch.float32, as the input is, got torch.float64",
    ),
    "scale on another device": (
        {}, (4, 3), {"update_scale": torch.ones(4, 3, device="meta")}, ValueError,
        r"update_scale must be on cpu, as the input is, got meta",
    ),
}  # fmt: skip


@VARIANT
@pytest.mark.parametrize("case", BAD_MODIFIERS)
def test_bad_resets_and_scales(monkeypatch, variant, case):
    settings, lead, given, error, text = BAD_MODIFIERS[case]
    layer = TriGRU(IN, H, variant=variant, **settings)
    monkeypatch.setattr("trigru.ops.recurrence", None)  # nothing runs before
    with pytest.raises(error, match=text):
        layer(torch.zeros(*lead, IN), **given)


@pytest.mark.parametrize(
    "given, error, text",
    [
        (bools(3, 3), ValueError, r"resets must have shape \(6,\), got \(3, 3\)"),
        (bools(5), ValueError, r"resets must have shape \(6,\), got \(5,\)"),
        (
            packed_as([2, 2, 2]),
            ValueError,
            r"batch_sizes tensor\(\[3, 2, 1\]\), got tensor\(\[2, 2",
        ),
        (packed_as([3, 2, 1], 2), ValueError, r"resets must have shape \(6,\), got \(6, 2\)"),
        (
            packed_as([3, 2, 1], sorted_indices=torch.tensor([1, 0, 2])),
            ValueError,
            r"sorted as the input is, with None, got tensor\(\[1, 0, 2\]\)",
        ),
        (packed_as([3, 2, 1]).to(torch.int64), TypeError, r"torch.bool, got torch.int64"),
        (packed_as([3, 2, 1]).to("meta"), ValueError, r"must be on cpu, .* got meta"),
    ],
    ids=["padded", "too few", "other sizes", "of two", "sorted", "int64", "another device"],
)
def test_bad_resets_of_packed_sequences(given, error, text):
    layer = TriGRU(IN, H)
    packed = PackedSequence(torch.zeros(6, IN), torch.tensor([3, 2, 1]))
    with pytest.raises(error, match=text):
        layer(packed, resets=given)


def test_scales_that_are_sorted_otherwise():
    layer = TriGRU(IN, H)
    x, scale = torch.zeros(6, IN), torch.ones(6)
    orders = [torch.tensor(order) for order in ([2, 0, 1], [0, 1, 2])]
    packed, other = (
        PackedSequence(data, torch.tensor([3, 2, 1]), sorted_indices=order)
        for data, order in zip((x, scale), orders, strict=True)
    )
    with pytest.raises(ValueError, match=r"update_scale must be sorted .*\[2, 0, 1\].*\[0, 1, 2\]"):
        layer(packed, update_scale=other)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"resets": None}, ValueError, "a reset_state is the state of resets: give these, too"),
        ({"resets": bools(5, 3)}, ValueError, r"resets must have shape \(5, 2\), got \(5, 3\)"),
        ({"resets": bools(5, 2, 2)}, ValueError, r"resets must have shape \(5, 2\), got \(5, 2, 2"),
        (
            {"resets": bools(5, 2).int()},
            TypeError,
            r"resets must be of torch.bool, got torch.int32",
        ),
        ({"resets": bools(5, 2, device="meta")}, ValueError, r"resets must be on cpu.*got meta"),
        ({"resets": True}, TypeError, r"resets must be a tensor, got bool"),
        ({"reset_state": torch.zeros(2, 4)}, RuntimeError, r"reset_state must have shape \(4,\)"),
        ({"reset_state": torch.zeros(4, dtype=F64)}, TypeError, r"'reset_state': torch.float64"),
        ({"reset_state": torch.zeros(4, device="meta")}, RuntimeError, r"'reset_state': 'meta'"),
        (
            {"update_scale": torch.ones(5, 2, 3)},
            ValueError,
            r"\(5, 2\) or \(5, 2, 4\), got \(5, 2, 3",
        ),
        ({"update_scale": bools(5, 2)}, TypeError, r"of a floating dtype, got torch.bool"),
        ({"update_scale": torch.ones(5, 2).double()}, TypeError, r"'update_scale': torch.float64"),
        ({"update_scale": torch.ones(5, 2, device="meta")}, ValueError, r"on cpu.*got meta"),
        ({"clip": 0.0}, ValueError, r"clip must be above 0, got 0.0"),
        ({"clip": float("nan")}, ValueError, r"clip must be above 0, got nan"),
        ({"clip": False}, TypeError, r"clip must be a number or None, got bool"),
        ({"clip": "2"}, TypeError, r"clip must be a number or None, got str"),
    ],
    ids=str,
)
@VARIANT
def test_bad_input_of_the_recurrence_alone(variant, change, error, text):
    given = {"gx": torch.zeros(5, 2, 12), "h0": torch.zeros(2, 4), "w_hh": torch.zeros(12, 4)}
    given |= {"resets": bools(5, 2), "reset_state": torch.zeros(4)}
    with pytest.raises(error, match=text):
        gru(**given | change, variant=variant)


@pytest.mark.parametrize(
    "settings, given",
    [
        ({"heads": 2}, {}),
        ({"learn_reset": True}, {}),
        ({"clip": 1.0}, {}),
        ({}, {"resets": bools(3, T)}),
        ({}, {"update_scale": torch.ones(3, T)}),
    ],
    ids=str,
)
def test_expanded_weights_are_refused(settings, given):
    layer = TriGRU(IN, H, batch_first=True, **settings)
    with pytest.raises(NotImplementedError, match=r"heads, a learned reset state, resets.* clip: "):
        call_for_per_sample_grads(layer, batch_size=3)(torch.randn(3, T, IN), **given)


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_a_state_that_is_held_at_the_limit_has_no_gradient(variant):
    """Forward and backward differentiated alike, where `torch.clamp` would pass one."""
    gx, w_hh = torch.randn(3, 2, 12, dtype=F64), torch.randn(12, 4, dtype=F64)
    h0, held = torch.full((2, 4), 0.25, dtype=F64), torch.zeros(3, 2, dtype=F64)

    def last(h0):
        return gru(gx, h0, w_hh, variant=variant, update_scale=held, clip=0.25)[1]

    _, tangent = jvp(last, (h0,), (torch.ones_like(h0),))
    _, pull = torch.func.vjp(last, h0)
    assert_close(last(h0), h0)
    assert not tangent.any() and not pull(torch.ones_like(h0))[0].any()


@pytest.mark.parametrize(
    "call",
    [
        lambda gx, h0, w: gru(gx, h0, w, resets=torch.ones(3, 2) > 0, reset_state=[0.0] * 4),
        lambda gx, h0, w: gru(gx, h0.tolist(), w),
        lambda gx, h0, w: TriGRU(5, 4).step([1.0]),
        lambda gx, h0, w: TriGRU(5, 4).step(torch.zeros(5), 5),
        lambda gx, h0, w: resets_from_cu_seqlens(torch.tensor([0, 5]), "5"),
    ],
)
def test_what_is_no_tensor_and_no_number_is_named(call):
    with pytest.raises(
        TypeError, match=r"(h0|hx|x_t|reset_state) must be a tensor|T must be an int"
    ):
        call(torch.zeros(3, 2, 12), torch.zeros(2, 4), torch.zeros(12, 4))


def test_a_clip_that_is_0_in_the_tensors_dtype_is_refused():
    gx, h0, w_hh = (torch.zeros(*s, dtype=FP16) for s in ((3, 2, 12), (2, 4), (12, 4)))
    with pytest.raises(ValueError, match=r"clip 1e-09 is 0 in torch\.float16"):
        gru(gx, h0, w_hh, clip=1e-9)
