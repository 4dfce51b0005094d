"""`TriGRU` beside nn.GRU, or, in the textbook form, beside a stack of the reference."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule
from torch import nn
from torch.func import functional_call
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.testing import assert_close

from trigru import TriGRU, ops, reference
from trigru.ops import without_cudnn

F64 = torch.float64
IN, H, T, B = 5, 6, 4, 3
VARIANT = pytest.mark.parametrize("variant", ops.VARIANTS)
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        dict(zip(("num_layers", "bidirectional", "batch_first", "bias"), values, strict=True))
        for values in itertools.product((1, 2), (False, True), (False, True), (True, False))
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
STACK = {"num_layers": 2, "bidirectional": True}  # every kind of weight there is


def textbook_stack(layer, weights, x, hx=None):
    """The textbook form of a whole stack; of `layer` only the settings are used."""
    batched, D = x.dim() == 3, 2 if layer.bidirectional else 1
    if not batched:
        x, hx = x.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    if hx is None:
        hx = x.new_zeros(layer.num_layers * D, x.shape[1], layer.hidden_size)
    h_n = []
    for k in range(layer.num_layers):
        names = [f"_l{k}{suffix}" for suffix in ("", "_reverse")[:D]]
        gx = [F.linear(x, weights["weight_ih" + n], weights.get("bias_ih" + n)) for n in names]
        w_hh = torch.stack([weights["weight_hh" + n] for n in names])
        y, h, _ = reference.gru_forward(
            torch.stack(gx, 2), hx[k * D : (k + 1) * D], w_hh, None, None, textbook=True,
            reverse=False, bidirectional=D == 2,
        )  # fmt: skip
        x = y.flatten(2)
        h_n.append(h)
    h_n = torch.cat(h_n)
    if not batched:
        return x.squeeze(1), h_n.squeeze(1)
    return x.transpose(0, 1) if layer.batch_first else x, h_n


def expected(layer, *, dtype=None):
    """What `layer` promises to compute, as a function of (x, hx) on its own parameters: nn.GRU or
    the stack of references, in `dtype` throughout where one is given."""
    theirs = TriGRU.to_torch(layer) if layer.variant == "torch" else None

    def function(x, hx=None):
        weights = {name: p.to(dtype or p.dtype) for name, p in layer.named_parameters()}
        x, hx = (None if t is None else t.to(dtype or t.dtype) for t in (x, hx))
        if theirs is None:
            return textbook_stack(layer, weights, x, hx)
        return functional_call(theirs, weights, (x, hx))

    return function


def make_case(layer, *, unbatched=False, with_hx=True, T=T, B=B):
    """Random (x, hx or None) and (dy, dh_n) for `layer`."""
    D = 2 if layer.bidirectional else 1
    lead = (T,) if unbatched else (B, T) if layer.batch_first else (T, B)
    state = (layer.num_layers * D,) + (() if unbatched else (B,)) + (layer.hidden_size,)
    shapes = (*lead, layer.input_size), state, (*lead, D * layer.hidden_size), state
    x, hx, *cotangents = (torch.randn(shape, dtype=layer.weight_ih_l0.dtype) for shape in shapes)
    return (x, hx if with_hx else None), tuple(cotangents)


def results(function, layer, case):
    """Outputs and all gradients of `function` on the case and on the layer's parameters."""
    inputs, cotangents = case
    x, hx = (None if t is None else t.clone().requires_grad_() for t in inputs)
    output, h_n = function(x, hx)
    leaves = {"dx": x, "dhx": hx, **dict(layer.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    cotangents = [c.to(t.dtype) for c, t in zip(cotangents, (output, h_n), strict=True)]
    grads = torch.autograd.grad((output, h_n), list(leaves.values()), cotangents)
    named = dict(zip(leaves, grads, strict=True))
    return {"output": output.detach(), "h_n": h_n.detach(), **named}


def in_double(layer, case):
    double = copy.deepcopy(layer).double()
    inputs, cotangents = case
    return double, (
        tuple(None if t is None else t.double() for t in inputs),
        tuple(t.double() for t in cotangents),
    )


# What it computes


@SETTINGS
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_results_in_float64(form, settings, unbatched, with_hx):
    layer = TriGRU(IN, H, **settings, variant=form, dtype=F64)
    case = make_case(layer, unbatched=unbatched, with_hx=with_hx)
    assert_close(results(layer, layer, case), results(expected(layer), layer, case))


@SETTINGS
def test_results_in_float32(form, settings):
    """At a size at which the largest error over a tensor is more than luck."""
    layer = TriGRU(48, 24, **settings, variant=form)
    case = make_case(layer, T=6, B=24)
    double, double_case = in_double(layer, case)
    assert_within_rule(
        results(layer, layer, case),
        results(expected(double), double, double_case),
        results(expected(layer), layer, case),
    )


@pytest.mark.parametrize("T, B", [(1, 1), (1, 3), (5, 1), (3, 0)], ids=str)
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_edges(form, T, B, with_hx):
    layer = TriGRU(IN, 1 if B == 1 else H, **STACK, variant=form, dtype=F64)
    case = make_case(layer, with_hx=with_hx, T=T, B=B)
    assert_close(results(layer, layer, case), results(expected(layer), layer, case))


def test_results_for_strided_inputs_and_expanded_gradients(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    (x, hx), _ = make_case(layer)
    grads = []
    for function in (layer, expected(layer)):
        leaves = x.clone().requires_grad_(), hx[:, :1].clone().requires_grad_()
        strided = torch.stack((leaves[0], leaves[0]), -1)[..., 0]
        output, _ = function(strided, leaves[1].expand_as(hx))
        grads.append(torch.autograd.grad(output.sum(), [*leaves, *layer.parameters()]))
    assert_close(*grads)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_results_without_gradients(form, mode):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    (x, hx), _ = make_case(layer)
    with mode():
        actual = layer(x, hx)
    assert not any(t.requires_grad for t in actual)
    assert_close(actual, tuple(t.detach() for t in expected(layer)(x, hx)))


def test_backward_in_eval_mode(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64).eval()
    case = make_case(layer)
    assert_close(results(layer, layer, case), results(expected(layer), layer, case))


def test_frozen_parameters(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    for name, p in layer.named_parameters():
        p.requires_grad_("_l1" in name)
    (x, hx), _ = make_case(layer)
    trained = [p for p in layer.parameters() if p.requires_grad]
    actual, exact = (
        torch.autograd.grad(function(x, hx)[0].square().sum(), trained)
        for function in (layer, expected(layer))
    )
    assert_close(actual, exact)


def test_double_backward(form):
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    (x, hx), _ = make_case(layer)
    seconds = []
    for function in (layer, expected(layer)):
        leaves = [x.clone().requires_grad_(), hx.clone().requires_grad_(), *layer.parameters()]
        output, h_n = function(*leaves[:2])
        loss = output.square().sum() + h_n.sin().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_close(*seconds)


def assert_autocast_within_rule(function, layer, case, dtype):
    def under_autocast(x, hx):
        with torch.autocast("cpu", dtype):
            output, h_n = function(x, hx)
        assert output.dtype == h_n.dtype == dtype
        return output, h_n

    double, double_case = in_double(layer, case)
    exact = results(expected(double), double, double_case)
    yardstick = results(expected(layer, dtype=dtype), layer, case)
    actual = results(under_autocast, layer, case)
    assert all(t.dtype == torch.float32 for name, t in actual.items() if name[0] in "dwb")
    # Every gradient was a number of `dtype` before it became one of float32.
    actual, yardstick = ({k: v.to(dtype) for k, v in r.items()} for r in (actual, yardstick))
    assert_within_rule(actual, exact, yardstick)


@HALF
@BIAS
def test_autocast(form, dtype, bias):
    layer = TriGRU(IN, 16, **STACK, bias=bias, variant=form)
    assert_autocast_within_rule(layer, layer, make_case(layer, B=32), dtype)


def test_autocast_without_hx(form):
    layer = TriGRU(IN, H, variant=form)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = layer(torch.randn(T, B, IN))
    assert output.dtype == h_n.dtype == torch.bfloat16


# Dropout


def test_dropout_only_in_training(form):
    layer = TriGRU(IN, H, **STACK, dropout=0.5, variant=form)
    without = TriGRU(IN, H, **STACK, variant=form)
    without.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, IN)
    assert not torch.equal(layer(x)[0], without(x)[0])
    assert_close(layer.eval()(x), without(x), rtol=0, atol=0)


def test_dropout_is_reproducible(form):
    layer = TriGRU(IN, H, num_layers=3, dropout=0.5, variant=form)
    x = torch.randn(T, B, IN)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_dropout_of_everything(form):
    """The upper layer then reads zeros; its own output is not dropped."""
    layer = TriGRU(IN, H, num_layers=2, dropout=1.0, variant=form, dtype=F64)
    x = torch.randn(T, B, IN, dtype=F64)
    output, h_n = layer(x)
    lower, upper = (TriGRU(size, H, variant=form, dtype=F64) for size in (IN, H))
    for k, each in enumerate((lower, upper)):
        weights = {n: p for n, p in layer.state_dict().items() if n.endswith(f"_l{k}")}
        each.load_state_dict({n.replace(f"_l{k}", "_l0"): p for n, p in weights.items()})
    zeros = torch.zeros(T, B, H, dtype=F64)
    assert_close(output, expected(upper)(zeros)[0])
    assert_close(h_n, torch.cat((expected(lower)(x)[1], expected(upper)(zeros)[1])))


# Parameters


@SETTINGS
def test_parameters_are_those_of_nn_gru(settings):
    layers = []
    for kind in (TriGRU, nn.GRU):
        torch.manual_seed(3)
        layers.append(kind(IN, H, **settings, dtype=F64))
    ours, theirs = layers
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0)


def test_parameters_of_the_textbook_form():
    layer = TriGRU(IN, H, **STACK, variant="textbook")
    shapes = {}
    for k, inputs in enumerate((IN, 2 * H)):
        for suffix in ("", "_reverse"):
            shapes[f"weight_ih_l{k}{suffix}"] = (3 * H, inputs)
            shapes[f"weight_hh_l{k}{suffix}"] = (3 * H, H)
            shapes[f"bias_ih_l{k}{suffix}"] = (3 * H,)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == shapes
    assert list(layer.state_dict()) == list(shapes)
    flat = [p for weights in layer.all_weights for p in weights]
    assert [id(p) for p in flat] == [id(p) for p in layer.parameters()]
    for p in flat:
        assert 0 < p.abs().max() <= H**-0.5


@VARIANT
@BIAS
@pytest.mark.parametrize("stack", [{}, STACK], ids=["one layer", "stack"])
def test_weights_reach_cudnn_only_in_its_own_number(monkeypatch, variant, bias, stack):
    """cuDNN lays out 4 weights of each layer and direction, or 2 without bias. A stand-in for a
    CUDA device, which is where nn.RNNBase asks for that."""
    asked = []
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: 3)
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: asked.append(args))
    layer = TriGRU(IN, H, **stack, bias=bias, variant=variant)
    layer.flatten_parameters()
    for weights, each, *_ in asked:
        assert each == (4 if bias else 2)
        assert len(weights) == each * len(layer.all_weights)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@SETTINGS
def test_repr(settings, dropout):
    settings = settings | {"num_layers": settings["num_layers"] + 1, "dropout": dropout}
    theirs = repr(nn.GRU(IN, H, **settings))
    assert repr(TriGRU(IN, H, **settings)) == "Tri" + theirs
    textbook = repr(TriGRU(IN, H, **settings, variant="textbook"))
    assert textbook == "Tri" + theirs[:-1] + ", variant='textbook')"


# Checkpoints


def nested(layer):
    return nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(IN, IN), layer), "head": nn.Linear(H, 2)}
    )


@BIAS
@pytest.mark.parametrize("wrap", [lambda layer: layer, nested], ids=["alone", "nested"])
@pytest.mark.parametrize("kinds", [(nn.GRU, TriGRU), (TriGRU, nn.GRU)], ids=["from", "to"])
def test_checkpoints_of_nn_gru(kinds, wrap, bias):
    source, target = (wrap(kind(IN, H, **STACK, bias=bias)) for kind in kinds)
    target.load_state_dict(source.state_dict())
    assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    layers = [model if wrap is not nested else model["encoder"][1] for model in (source, target)]
    x = torch.randn(T, B, IN)
    assert_close(layers[1](x), layers[0](x))


def from_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def as_nn_gru(**settings):
    return nn.GRU(IN, H, **settings)


def as_variant(variant):
    return lambda **settings: TriGRU(IN, H, **settings, variant=variant)


STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
WRAP = pytest.mark.parametrize("wrap", [lambda layer: layer, nested], ids=["alone", "nested"])
MAKE_GRU = pytest.mark.parametrize(
    "source", [as_nn_gru, as_variant("torch")], ids=["nn.GRU", "torch"]
)


@BIAS
@STRICT
@pytest.mark.parametrize("store", [lambda state: state, from_file], ids=["", "from a file"])
@WRAP
@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_checkpoints_of_another_variant(variant, wrap, store, strict, bias):
    (other,) = set(ops.VARIANTS) - {variant}
    state = store(wrap(as_variant(other)(bias=bias)).state_dict())
    layer = TriGRU(IN, H, bias=bias, variant=variant)
    with pytest.raises(RuntimeError, match=f"the layer of variant '{variant}'"):
        wrap(layer).load_state_dict(state, strict=strict)


@STRICT
@WRAP
@MAKE_GRU
@pytest.mark.parametrize("store", [lambda state: state, dict, from_file], ids=["", "flat", "file"])
@pytest.mark.parametrize("bias", [True, False], ids=["into biases", "into none"])
def test_the_textbook_form_refuses_the_second_biases(source, wrap, store, strict, bias):
    """They are the torch form's alone: to leave them out would be another function."""
    state = store(wrap(source()).state_dict())
    model = wrap(TriGRU(IN, H, bias=bias, variant="textbook"))
    with pytest.raises(
        RuntimeError, match="is of variant 'torch', the layer of variant 'textbook'"
    ):
        model.load_state_dict(state, strict=strict)


@WRAP
def test_a_checkpoint_that_does_not_say_its_variant(wrap, recwarn):
    """Without biases nn.GRU's has the same names."""
    source, model = nn.GRU(IN, H, bias=False), TriGRU(IN, H, bias=False, variant="textbook")
    state = wrap(source).state_dict()
    with pytest.warns(UserWarning, match="does not say its variant; if it is nn.GRU's"):
        wrap(model).load_state_dict(state)
    assert_close(dict(model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    wrap(model).load_state_dict(dict(state))
    assert not recwarn.list


def stripped_by_hand(state, prefix):
    """As scripts do it, which leave the metadata as it was."""
    for key in list(state):
        state[key.removeprefix(prefix)] = state.pop(key)


RENAMED = {  # what holds the layer when it is saved, and what when it is loaded
    "DataParallel's": ("module.", lambda m: nn.ModuleDict({"module": m})),
    "one level": ("encoder.", lambda m: nn.ModuleDict({"encoder": m})),
    "two levels": ("model.encoder.", lambda m: nn.ModuleDict({"model": nested_as_encoder(m)})),
}


def nested_as_encoder(layer):
    return nn.ModuleDict({"encoder": layer})


@VARIANT
@BIAS
@WRAP
@pytest.mark.parametrize("strip", [stripped_by_hand, consume_prefix_in_state_dict_if_present])
@pytest.mark.parametrize("renamed", RENAMED)
@pytest.mark.filterwarnings("ignore:the checkpoint of .* does not say its variant")
def test_checkpoints_with_other_prefixes(renamed, strip, wrap, variant, bias):
    prefix, hold = RENAMED[renamed]
    source, target = (TriGRU(IN, H, **STACK, bias=bias, variant=variant) for _ in range(2))
    state = hold(wrap(source)).state_dict()
    strip(state, prefix)
    assert wrap(target).load_state_dict(state) == ([], [])
    assert_close(list(target.parameters()), list(source.parameters()), rtol=0, atol=0)


@BIAS
def test_metadata_of_another_layer(bias):
    """Keys have been renamed, and the metadata in their place was not: it speaks of no weights."""
    old = nn.ModuleDict({"gru": TriGRU(IN, H, bias=bias, variant="textbook")})
    state = old.state_dict()
    for key in list(state):
        state["old_" + key] = state.pop(key)
    layers = {"old_gru": "textbook", "gru": "torch"}
    new = nn.ModuleDict({n: TriGRU(IN, H, bias=bias, variant=v) for n, v in layers.items()})
    missing, unexpected = new.load_state_dict(state, strict=False)
    assert all(key.startswith("gru.") for key in missing) and not unexpected
    assert_close(new["old_gru"].weight_hh_l0, old["gru"].weight_hh_l0)


def test_metadata_of_another_layer_beside_second_biases():
    source, target = TriGRU(IN, H), TriGRU(IN, H)
    state = source.state_dict()
    state._metadata[""]["variant"] = "textbook"
    target.load_state_dict(state)
    assert_close(list(target.parameters()), list(source.parameters()), rtol=0, atol=0)


def test_a_hook_may_convert_a_checkpoint():
    """The variant is judged after the hooks that load_state_dict runs."""

    def convert(state, prefix, metadata, *_):
        metadata["variant"] = "textbook"
        del state[f"{prefix}bias_hh_l0"]

    layer = TriGRU(IN, H, variant="textbook")
    layer.register_load_state_dict_pre_hook(lambda module, *args: convert(*args))
    source = nn.GRU(IN, H)
    layer.load_state_dict(source.state_dict())
    assert_close(layer.weight_hh_l0, source.weight_hh_l0)


@VARIANT
@BIAS
@pytest.mark.parametrize("store", [dict, from_file], ids=["plain dict", "from a file"])
def test_checkpoints_of_the_same_variant(store, variant, bias):
    """A plain dict has no metadata that could name the variant: matching names will do."""
    source, target = (TriGRU(IN, H, **STACK, bias=bias, variant=variant) for _ in range(2))
    assert target.load_state_dict(store(source.state_dict())) == ([], [])
    assert_close(list(target.parameters()), list(source.parameters()), rtol=0, atol=0)


# Errors


def outcome(kind, settings, call):
    """The type and text of what a construction and call raises, and of what it warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(kind(*settings.pop("args", (IN, H)), **settings))
        except Exception as error:
            raised = type(error), str(error)
        else:
            raised = None
    return raised, [(w.category, str(w.message)) for w in caught]


BAD_CALLS = {
    "1-D": lambda gru: gru(torch.zeros(IN)),
    "4-D": lambda gru: gru(torch.zeros(2, T, B, IN)),
    "0-D": lambda gru: gru(torch.zeros(())),
    "2-D hx for 3-D input": lambda gru: gru(torch.zeros(T, B, IN), torch.zeros(1, H)),
    "4-D hx for 3-D input": lambda gru: gru(torch.zeros(T, B, IN), torch.zeros(1, 1, B, H)),
    "3-D hx for 2-D input": lambda gru: gru(torch.zeros(T, IN), torch.zeros(1, 1, H)),
    "1-D hx for 2-D input": lambda gru: gru(torch.zeros(T, IN), torch.zeros(H)),
    "input size": lambda gru: gru(torch.zeros(T, B, IN + 1)),
    "input size, unbatched": lambda gru: gru(torch.zeros(T, IN - 1)),
    "input size, with hx": lambda gru: gru(torch.zeros(T, B, 1), torch.zeros(1, B, H)),
    "float64": lambda gru: gru(torch.zeros(T, B, IN, dtype=F64)),
    "int64": lambda gru: gru(torch.zeros(T, B, IN, dtype=torch.int64)),
    "float64 and input size": lambda gru: gru(torch.zeros(T, B, 1, dtype=F64)),
    "hx of other H": lambda gru: gru(torch.zeros(T, B, IN), torch.zeros(1, B, H + 1)),
    "hx of other B": lambda gru: gru(torch.zeros(T, B, IN), torch.zeros(1, 7, H)),
    "hx of other layers": lambda gru: gru(torch.zeros(T, B, IN), torch.zeros(9, B, H)),
    "hx of other H, unbatched": lambda gru: gru(torch.zeros(T, IN), torch.zeros(1, H + 1)),
    "hx of other layers, unbatched": lambda gru: gru(torch.zeros(T, IN), torch.zeros(9, H)),
    "no steps": lambda gru: gru(torch.zeros(0, B, IN)),
    "no steps, batch first": lambda gru: gru(torch.zeros(B, 0, IN)),
    "no steps, unbatched": lambda gru: gru(torch.zeros(0, IN)),
    "no steps, bad hx": lambda gru: gru(torch.zeros(0, B, IN), torch.zeros(1, 7, H)),
    "no steps, no batch": lambda gru: gru(torch.zeros(0, 0, IN)),
    "a list": lambda gru: gru([0.0]),
    "nothing": lambda gru: gru(None),
}


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
def test_errors_of_calls(form, call, batch_first, bidirectional):
    settings = {"batch_first": batch_first, "bidirectional": bidirectional}
    theirs = outcome(nn.GRU, dict(settings), BAD_CALLS[call])
    assert outcome(TriGRU, settings | {"variant": form}, BAD_CALLS[call]) == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"args": (0, H)}, {"args": (-1, H)}, {"args": ("5", H)}, {"args": (2.5, H)},
        {"args": (IN, 0)}, {"args": (IN, -1)}, {"args": (IN, "5")}, {"args": (IN, 2.5)},
        {"args": (IN, None)}, {"num_layers": 0}, {"num_layers": -1}, {"dropout": -0.1},
        {"dropout": 1.5}, {"dropout": True}, {"dropout": "much"}, {"dropout": 0.5},
        {"bias": 1}, {"bias": None}, {"batch_first": 1}, {"batch_first": "yes"},
        {"dtype": torch.int64}, {"device": "nowhere"},
    ],
    ids=str,
)  # fmt: skip
@VARIANT
def test_errors_and_warnings_of_constructors(settings, variant):
    theirs = outcome(nn.GRU, dict(settings), lambda gru: None)
    assert theirs != (None, [])
    assert outcome(TriGRU, settings | {"variant": variant}, lambda gru: None) == theirs


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"variant must be one of .*, got 'lstm'"):
        TriGRU(IN, H, variant="lstm")


def test_results_can_be_changed_in_place(form):
    """As states are, to begin an episode anew."""
    layer = TriGRU(IN, H, variant=form)
    y, h_n = layer(torch.randn(T, B, IN))
    h_n[:, 0] = 0
    (y.sum() + h_n.sum()).backward()
    with torch.no_grad():
        layer(torch.randn(T, B, IN))[0].mul_(2)


def test_cudnn_is_back_when_the_last_call_is_done():
    enabled = torch.backends.cudnn.enabled
    first, second = without_cudnn(), without_cudnn()
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        assert not torch.backends.cudnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.enabled == enabled


# Compiled


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "variant, settings, options, backend",
    [
        ("torch", {"bias": False}, {"unbatched": True, "with_hx": False}, "aot_eager"),
        ("textbook", {"bias": False}, {"unbatched": True, "with_hx": False}, "aot_eager"),
        ("torch", STACK | {"batch_first": True}, {}, "aot_eager"),
        ("textbook", STACK | {"batch_first": True}, {}, "aot_eager"),
        ("torch", STACK, {"with_hx": False}, "inductor"),
    ],
    ids=str,
)
def test_compiles_into_one_graph(fresh_dynamo, variant, settings, options, backend):
    layer = TriGRU(IN, H, **settings, variant=variant, dtype=F64)
    case = make_case(layer, **options)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert_close(results(compiled, layer, case), results(expected(layer), layer, case))


@VARIANT
def test_compiled_without_gradients(fresh_dynamo, variant):
    layer = TriGRU(IN, H, **STACK, dropout=0.5, variant=variant, dtype=F64).eval()
    (x, hx), _ = make_case(layer)
    with torch.no_grad():
        actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, hx)
        assert_close(actual, expected(layer)(x, hx))


@VARIANT
def test_compiled_under_autocast(fresh_dynamo, variant):
    layer = TriGRU(IN, 16, **STACK, variant=variant)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_autocast_within_rule(compiled, layer, make_case(layer, B=32), torch.bfloat16)


@VARIANT
@pytest.mark.parametrize(
    "how, batch_first", [("dynamic=True", False), ("mark_dynamic", True)], ids=str
)
def test_other_sizes_do_not_compile_again(fresh_dynamo, variant, how, batch_first):
    layer = TriGRU(IN, H, bidirectional=True, batch_first=batch_first, variant=variant, dtype=F64)
    compiled = torch.compile(
        layer, fullgraph=True, backend="aot_eager", dynamic=True if how == "dynamic=True" else None
    )

    def function(x, hx):
        if how == "mark_dynamic":
            for tensor, dims in ((x, (0, 1)), (hx, (1,))):
                torch._dynamo.mark_dynamic(tensor, dims)
        return compiled(x, hx)

    stance = "default"
    for steps, rows in ((9, 7), (11, 7), (4, 13)):
        case = make_case(layer, T=steps, B=rows)
        with torch.compiler.set_stance(stance):
            assert_close(results(function, layer, case), results(expected(layer), layer, case))
        stance = "fail_on_recompile"


@VARIANT
def test_transforms_within_a_compiled_function(fresh_dynamo, variant):
    """They break the graph, and are right; a full graph is refused."""
    layer = TriGRU(IN, H, variant=variant, dtype=F64)
    x = torch.randn(2, T, B, IN, dtype=F64)

    def function(x):
        rows = torch.func.vmap(lambda x: layer(x)[0])(x)
        return rows, *torch.func.jvp(lambda x: layer(x)[0], (x[0],), (x[1],))

    assert_close(torch.compile(function, backend="aot_eager")(x), function(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot hold a TriGRU inside"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(x)


# As any other module


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(form, make):
    layer = TriGRU(IN, H, **STACK, batch_first=True, variant=form, dtype=F64).eval()
    case = make_case(layer)
    layer(*case[0])
    other = make(layer)
    assert repr(other) == repr(layer) and not other.training
    assert_close(results(other, other, case), results(layer, layer, case), rtol=0, atol=0)
    before = layer(*case[0])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_close(layer(*case[0]), before, rtol=0, atol=0)
    assert not other(*case[0])[0].equal(before[0])


@BIAS
def test_from_the_meta_device(form, bias):
    source = TriGRU(IN, H, **STACK, bias=bias, variant=form)
    layer = TriGRU(IN, H, **STACK, bias=bias, variant=form, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    case = make_case(source)
    assert_close(results(layer, layer, case), results(source, source, case), rtol=0, atol=0)
    for store in (lambda state: state, dict, from_file):
        assigned = TriGRU(IN, H, **STACK, bias=bias, variant=form, device="meta")
        assigned.load_state_dict(store(source.state_dict()), assign=True)
        actual = results(assigned, assigned, case)
        assert_close(actual, results(source, source, case), rtol=0, atol=0)


@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
def test_on_the_meta_device(form, with_hx):
    layer = TriGRU(IN, H, **STACK, variant=form, device="meta")
    x, hx = torch.empty(T, B, IN, device="meta"), torch.empty(4, B, H, device="meta")
    output, h_n = layer(x, hx) if with_hx else layer(x)
    assert output.is_meta and output.shape == (T, B, 2 * H)
    assert h_n.is_meta and h_n.shape == (4, B, H)


def test_replaced_weights(form):
    layer, other = (TriGRU(IN, H, **STACK, variant=form, dtype=F64) for _ in range(2))
    (x, hx), _ = make_case(layer)
    own, exact = layer(x, hx), expected(other)(x, hx)
    actual = functional_call(layer, dict(other.named_parameters()), (x, hx))
    assert_close(actual, exact)
    inner = torch.autograd.grad(actual[0].sum(), list(other.parameters()))
    assert_close(inner, torch.autograd.grad(exact[0].sum(), list(other.parameters())))
    assert_close(layer(x, hx), own, rtol=0, atol=0)
    layer.weight_hh_l1 = other.weight_hh_l1
    with torch.no_grad():
        layer.weight_ih_l0.mul_(2)
    assert_close(layer(x, hx), expected(layer)(x, hx))


def test_other_dtypes(form):
    layer = TriGRU(IN, H, **STACK, variant=form).to(F64)
    case = make_case(layer)
    assert all(t.dtype == F64 for t in case[0])
    assert_close(results(layer, layer, case), results(expected(layer), layer, case))
