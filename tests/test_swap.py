"""From nn.GRU to `TriGRU` and back: a layer, and those of a whole model."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from layers import BIAS, F64, IN, SETTINGS, B, H, T
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune
from torch.testing import assert_close

from trigru import TriGRU, ops, replace_gru, restore_gru

KINDS = pytest.mark.parametrize(
    "kind, convert", [(nn.GRU, TriGRU.from_torch), (TriGRU, TriGRU.to_torch)], ids=["from", "to"]
)
SWAPS = pytest.mark.parametrize(
    "kind, swap, other", [(nn.GRU, replace_gru, TriGRU), (TriGRU, restore_gru, nn.GRU)],
    ids=["replace", "restore"],
)  # fmt: skip
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# A layer


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@SETTINGS
@KINDS
def test_conversions_share_everything(kind, convert, settings, training):
    settings = settings | {"num_layers": settings["num_layers"] + 1, "dropout": 0.5}
    source = kind(IN, H, **settings, dtype=F64).train(training)
    source.weight_hh_l0.requires_grad_(False)
    target = convert(source)
    assert type(target) is (TriGRU if kind is nn.GRU else nn.GRU)
    assert repr(target).removeprefix("Tri") == repr(source).removeprefix("Tri")
    assert target.training == training
    ours, theirs = dict(target.named_parameters()), dict(source.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in ours)
    assert not target.weight_hh_l0.requires_grad
    x = torch.randn(T, B, IN, dtype=F64)
    assert_close(target.eval()(x), source.eval()(x))


def test_conversions_of_tied_weights():
    source = nn.GRU(H, H, num_layers=2)
    source.weight_hh_l1 = source.weight_hh_l0
    target = TriGRU.from_torch(source)
    assert target.weight_hh_l1 is target.weight_hh_l0 is source.weight_hh_l0
    x = torch.randn(T, B, H)
    assert_close(target(x), source(x))


def test_conversion_to_a_subclass():
    class Mine(TriGRU):
        pass

    assert type(Mine.from_torch(nn.GRU(IN, H))) is Mine


LACKING = {  # what nn.GRU does not have, and what is said of it
    "heads": ({"heads": 2}, r"nn\.GRU has no heads, the layer has 2: see trigru.convert.to_dense"),
    "clip": ({"clip": 0.5}, r"nn\.GRU has no clip, the layer has 0.5"),
    "reset state": (
        {"learn_reset": True}, r"nn\.GRU has no reset_state, which the layer has learned",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lacking", LACKING)
def test_what_nn_gru_does_not_have(lacking):
    """Alone and in a model, of which all stays as it is."""
    settings, text = LACKING[lacking]
    layer = TriGRU(IN, 4, **settings)
    with pytest.raises(ValueError, match=text):
        layer.to_torch()
    model = nn.ModuleDict({"a": TriGRU(IN, 4), "b": nn.Sequential(layer), "c": layer})
    layers = list(model.modules())
    with pytest.raises(ValueError, match=f"^'b.0': {text}$"):
        restore_gru(model)
    assert list(model.modules()) == layers


@BIAS
def test_the_textbook_form_has_no_nn_gru(bias):
    with pytest.raises(ValueError, match=r"nn\.GRU cannot compute the textbook variant"):
        TriGRU(IN, H, bias=bias, variant="textbook").to_torch()


def change(module):
    """Other weights, as new tensors: who still holds the old layer computes by the old ones."""
    module.load_state_dict({k: 1.5 * v for k, v in module.state_dict().items()}, assign=True)


def assert_runs_its_weights(module, x, plain):
    """As `plain`, which is made of nn.GRU and not compiled, does with the same."""
    state = {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}
    plain.load_state_dict(state)
    assert_close(module(x), plain(x))


@KINDS
def test_a_compiled_form_stays_behind(kind, convert):
    """It is bound to the layer that was compiled, and would go on running it."""
    source, x = kind(IN, H), torch.randn(T, B, IN)
    source.compile(backend="eager")
    source(x)
    target = convert(source)
    change(target)
    assert_runs_its_weights(target, x, nn.GRU(IN, H))


def test_a_converted_layer_holds_no_weights_but_its_own():
    layer = TriGRU.from_torch(nn.GRU(IN, H))
    old = weakref.ref(layer.weight_hh_l0)
    change(layer)
    gc.collect()
    assert old() is None


@KINDS
def test_a_wrapper_is_no_layer(kind, convert):
    with pytest.raises(TypeError, match=f"expected an? .*{kind.__name__} itself, got Optimized"):
        convert(torch.compile(kind(IN, H)))


@KINDS
def test_attributes_of_an_instance_stay_behind(kind, convert):
    source, x = kind(IN, H), torch.randn(T, B, IN)
    source.forward = source.forward
    source.note = "mine"
    with pytest.warns(UserWarning, match=f"set on this {kind.__name__} itself stays behind"):
        target = convert(source)
    change(target)
    assert_runs_its_weights(target, x, nn.GRU(IN, H))
    assert not hasattr(target, "note")


@KINDS
def test_a_conversion_and_its_source_are_two_modules(kind, convert):
    """What is registered with one of them is not with the other."""
    source = kind(IN, H)
    target, names, weight = convert(source), list(source.state_dict()), source.weight_hh_l0
    for name in ("mask", "other"):
        target.register_buffer(name, torch.ones(1), persistent=name == "mask")
        source.register_buffer(name, torch.ones(1), persistent=name != "mask")
    target.weight_hh_l0 = nn.Parameter(weight.detach() * 2)
    target.register_forward_hook(lambda *_: pytest.fail("a hook of the other"))
    source(torch.randn(T, B, IN))
    assert source.weight_hh_l0 is source._flat_weights[1] is weight
    assert set(source.state_dict()) == {*names, "other"}
    assert set(target.state_dict()) == {*names, "mask"}


@KINDS
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_norms_that_are_hooks_come_along(kind, convert, norm):
    """As pruning does, they leave the weight as an attribute of its own name."""
    source, x = norm(kind(IN, H), "weight_hh_l0").eval(), torch.randn(T, B, IN)
    target = convert(source)
    assert target.weight_hh_l0 is source.weight_hh_l0
    assert_close(target(x), source(x))
    assert list(target.state_dict()) == list(source.state_dict())


def test_hooks_and_pruning_come_along():
    """As PyTorch keeps them: pruning is a hook that makes the weight anew before each call."""
    model = nn.ModuleList([nn.GRU(IN, H)])
    prune.random_unstructured(model[0], "weight_hh_l0", 0.5)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    x = torch.randn(T, B, IN)
    before = model[0](x)
    replace_gru(model)
    assert_close(model[0](x), before)
    back = model[0].to_torch()
    assert_close(back(x), before)
    assert seen == [nn.GRU, TriGRU, nn.GRU]
    model[0](x)[0].sum().backward()
    grad = model[0].weight_hh_l0_orig.grad
    assert torch.equal(grad == 0, model[0].weight_hh_l0_mask == 0)


def test_a_hook_that_knows_its_module_knows_the_new_one():
    model, seen = nn.ModuleList([nn.GRU(IN, H)]), []
    model[0].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    replace_gru(model)
    model.load_state_dict(model.state_dict())
    assert seen == [model[0]]


def test_a_parametrised_layer_has_no_nn_gru():
    for layer in (type("Mine", (TriGRU,), {})(IN, H), TriGRU(IN, H)):
        if type(layer) is TriGRU:
            nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        with pytest.raises(TypeError, match="expected a TriGRU itself, got"):
            layer.to_torch()


def test_a_parametrised_layer_is_left_alone():
    model = nn.ModuleList([nn.GRU(IN, H)])
    nn.utils.parametrizations.weight_norm(model[0], "weight_hh_l0")
    assert replace_gru(model) == 0
    with pytest.raises(TypeError, match=r"expected an nn\.GRU itself, got ParametrizedGRU"):
        TriGRU.from_torch(model[0])


# A model


class Subclass(nn.GRU):
    pass


class Model(nn.Module):
    """An nn.GRU at the top, one used twice further down, one of a subclass, and an nn.LSTM."""

    def __init__(self):
        super().__init__()
        shared = nn.GRU(H, H, batch_first=True)
        self.first = nn.GRU(IN, H, batch_first=True)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"gru": shared, "out": nn.Linear(H, H)}) for _ in "ab"
        )
        self.special = Subclass(H, H, batch_first=True)
        self.lstm = nn.LSTM(H, 2, batch_first=True)

    def forward(self, x):
        x, _ = self.first(x)
        for block in self.blocks:
            x = block["out"](block["gru"](x)[0])
        return self.lstm(self.special(x)[0])[0]


def test_replace_gru():
    model = Model()
    names, before = list(model.state_dict()), dict(model.named_parameters())
    x = torch.randn(B, T, IN)
    exact = model(x)
    assert replace_gru(model) == 2
    assert type(model.first) is TriGRU and model.first.batch_first
    assert type(model.blocks[0]["gru"]) is TriGRU
    assert model.blocks[0]["gru"] is model.blocks[1]["gru"]
    assert type(model.special) is Subclass and type(model.lstm) is nn.LSTM
    assert list(model.state_dict()) == names
    assert all(p is before[name] for name, p in model.named_parameters())
    assert_close(model(x), exact)
    assert replace_gru(model) == 0


def test_replace_gru_in_a_container():
    model = nn.Sequential(nn.Sequential(nn.GRU(IN, H)), nn.ReLU()).eval()
    assert replace_gru(model) == 1
    assert type(model[0][0]) is TriGRU and not model[0][0].training


def test_replace_gru_of_the_model_itself():
    with pytest.raises(ValueError, match=r"use TriGRU.from_torch\(model\)"):
        replace_gru(nn.GRU(IN, H))
    assert replace_gru(Subclass(IN, H)) == 0
    assert replace_gru(nn.Linear(IN, H)) == 0


def test_an_optimiser_trains_a_replaced_model():
    model = Model()
    untouched = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, untouched)]
    before = copy.deepcopy(model.state_dict())
    replace_gru(model)
    x = torch.randn(B, T, IN)
    for _ in range(3):
        for each, optimiser in zip((model, untouched), optimisers, strict=True):
            optimiser.zero_grad()
            each(x).square().sum().backward()
            optimiser.step()
    assert_close(dict(model.state_dict()), dict(untouched.state_dict()))
    assert not any(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_restore_gru():
    """The inverse: the same layers, parameters and hooks, and an optimiser that still has them."""
    model, seen = Model(), []
    model.first.register_forward_hook(lambda module, *_: seen.append(type(module)))
    model.special = Mine(H, H, batch_first=True)
    names, before = list(model.state_dict()), dict(model.named_parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(B, T, IN)
    exact = model(x)
    assert replace_gru(model) == restore_gru(model) == 2
    assert type(model.first) is nn.GRU and type(model.special) is Mine
    assert model.blocks[0]["gru"] is model.blocks[1]["gru"]
    assert list(model.state_dict()) == names
    assert all(p is before[name] for name, p in model.named_parameters())
    assert_close(model(x), exact)
    assert seen == [nn.GRU, nn.GRU] and restore_gru(model) == 0
    model(x).square().sum().backward()
    optimiser.step()
    assert not torch.allclose(model(x), exact)


class Mine(TriGRU):
    pass


def test_restore_gru_of_the_model_itself():
    for variant in ops.VARIANTS:
        with pytest.raises(ValueError, match=r"itself is a TriGRU: use model\.to_torch\(\)"):
            restore_gru(TriGRU(IN, H, variant=variant))
    assert restore_gru(Mine(IN, H)) == restore_gru(nn.GRU(IN, H)) == 0


def test_restore_gru_leaves_all_where_one_has_no_nn_gru():
    model = nn.ModuleDict(
        {"a": TriGRU(IN, H), "b": nn.Sequential(TriGRU(H, H, variant="textbook"))}
    )
    layers = list(model.modules())
    with pytest.raises(ValueError, match=r"^'b.0': nn.GRU cannot compute the textbook variant$"):
        restore_gru(model)
    assert list(model.modules()) == layers


def test_restored_models_are_scripted():
    model = nn.Sequential(TriGRU(IN, H))
    x = torch.randn(T, B, IN)
    exact = model(x)
    restore_gru(model)
    assert isinstance(model[0], nn.GRU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert_close(torch.jit.script(model)(x), exact)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_restored_models_are_quantized():
    model, x = nn.Sequential(TriGRU(IN, H)), torch.randn(T, B, IN)
    exact = model(x)[0]
    restore_gru(model)
    quantized = quantize_dynamic(model, {nn.GRU})
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.GRU
    # int8 has 1/254 of the largest weight or input; what the layer does with it is about 1.
    assert (quantized(x)[0] - exact).abs().max() < 0.05


@SWAPS
def test_one_layer_under_several_names(kind, swap, other):
    model = nn.Module()
    model.a = model.b = kind(IN, H)
    model.each = nn.ModuleList([model.a, nn.Sequential(model.a)])
    model.named = nn.ModuleDict({"a": model.a, "linear": nn.Linear(IN, H)})
    assert swap(model) == 1
    assert type(model.a) is other
    places = model.b, model.each[0], model.each[1][0], model.named["a"]
    assert all(layer is model.a for layer in places)


class Watched(nn.Module):
    """Does more than nn.Module with what is set on it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__["mine"] = value


class Frozen(Watched):
    def __setattr__(self, name, value):
        if getattr(self, "layer", None) is not None:
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class Deaf(Watched):
    def __setattr__(self, name, value):
        if getattr(self, "layer", None) is None:
            super().__setattr__(name, value)


@SWAPS
def test_parents_with_their_own_way_of_setting_attributes(kind, swap, other):
    model = Watched(kind(IN, H))
    assert swap(model) == 1
    assert type(model.layer) is other and model.mine is model.layer


@SWAPS
@pytest.mark.parametrize(
    "parent, error, says",
    [(Frozen, AttributeError, "frozen"), (Deaf, RuntimeError, "Deaf did not keep the")],
)
def test_parents_that_refuse(kind, swap, other, parent, error, says):
    """Then nothing is changed, also not what came before."""
    model = nn.Sequential(kind(IN, H), a_layer_alone([None, kind(IN, H)]), parent(kind(H, H)))
    layers, x = list(model.modules()), torch.randn(T, B, IN)
    with pytest.raises(error, match=says):
        swap(model)
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    change(model[1])
    assert_runs_its_weights(model[1], x, nn.GRU(IN, H))


# Compiled models


def make_model(kind):
    return nn.Sequential(nn.Linear(IN, IN), kind(IN, H))


def a_layer_alone(model):
    return torch.compile(model[1], backend="eager")


def a_layer(model):
    model[1] = a_layer_alone(model)
    return model


def a_layer_in_place(model):
    model[1].compile(backend="eager")
    return model


def a_layer_that_is_not_to_be(model):
    model[1] = torch.compiler.disable(model[1])
    return model


def the_whole(model):
    return torch.compile(model, backend="eager")


def the_whole_in_place(model):
    model.compile(backend="eager")
    return model


def both(model):
    return the_whole(a_layer(model))


COMPILED = (
    a_layer_alone, a_layer, a_layer_in_place, a_layer_that_is_not_to_be, the_whole,
    the_whole_in_place, both,
)  # fmt: skip


@SWAPS
@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("called", [False, True], ids=["", "called before"])
def test_compiled_models(kind, swap, other, compiled, called):
    """They run the new layer, by its weights of now, and keep their keys."""
    model, x = compiled(make_model(kind)), torch.randn(T, B, IN)
    if called:
        model(x)
    keys = list(model.state_dict())
    assert swap(model) == 1
    assert {type(m) for m in model.modules()} & {kind, other} == {other}
    plain = make_model(nn.GRU)
    if compiled is a_layer_alone:
        plain = plain[1]
    for _ in range(2):
        assert_runs_its_weights(model, x, plain)
        change(model)
    assert_runs_its_weights(model, x, plain)
    assert list(model.state_dict()) == keys


@SWAPS
def test_a_compiled_layer_keeps_its_options_and_hooks(kind, swap, other):
    graphs, seen = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, x = nn.Sequential(torch.compile(kind(IN, H), backend=backend)), torch.randn(T, B, IN)
    model[0].register_forward_hook(lambda module, *_: seen.append(module))
    wrapper = model[0]
    swap(model)
    model(x)
    assert model[0] is wrapper is seen[0] and type(wrapper._orig_mod) is other
    assert bool(graphs) == (other is TriGRU)  # Dynamo takes no nn.GRU into a graph
    again = torch.compile(wrapper, backend="eager")
    change(model)
    assert_close(again(x), wrapper(x))
