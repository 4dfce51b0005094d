"""What a sequence may have besides its steps: resets, update_scale, clip, heads, and documents back
to back. Beside sequences that are really cut, a loop by hand, and published equations."""

import itertools

import pytest
import torch
from layers import (
    ALL_SETTINGS,
    F64,
    IN,
    KINDS,
    SETTINGS,
    STACK,
    VARIANT,
    H,
    by_hand,
    data_of,
    make_hx,
    results,
)
from torch.func import functional_call
from torch.nn.utils.rnn import pack_sequence
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
