"""What PyTorch does to a module besides calling it: copies of compiled ones, torch.fx."""

import copy
import io

import pytest
import torch
from layers import F64, IN, STACK, VARIANT, B, H, T, expected
from torch import fx, nn
from torch.ao.quantization import default_dynamic_qconfig, get_default_qconfig_mapping, quantize_fx
from torch.ao.quantization.qconfig_mapping import QConfigMapping
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from trigru import TriGRU


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def change(module):
    """Other weights in their place."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)


def assert_runs_its_weights(module, x):
    """As the layer that is `module`, or inside of it, would if it were not compiled."""
    (layer,) = (m for m in module.modules() if isinstance(m, TriGRU))
    assert_close(module(x), expected(layer)(x))


# Compiled


def in_place(layer):
    layer.compile(backend="eager")
    return layer


def wrapped(layer):
    return torch.compile(layer, backend="eager")


def from_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COMPILED = pytest.mark.parametrize("compiled", [in_place, wrapped])


@VARIANT
@COMPILED
@pytest.mark.parametrize("make", [copy.deepcopy, from_file, AveragedModel])
def test_copies_of_a_compiled_layer(variant, compiled, make):
    """They run their own weights, and the layer those that it had."""
    layer = compiled(TriGRU(IN, H, **STACK, variant=variant, dtype=F64))
    x = torch.randn(T, B, IN, dtype=F64)
    before = layer(x)
    other = make(layer)
    assert_close(other(x), before)
    change(other)
    assert_runs_its_weights(other, x)
    assert_close(layer(x), before)


@VARIANT
@COMPILED
def test_an_average_of_a_compiled_layer(variant, compiled):
    layer, x = compiled(TriGRU(IN, H, variant=variant, dtype=F64)), torch.randn(T, B, IN, dtype=F64)
    average = AveragedModel(layer)
    for _ in range(2):
        average.update_parameters(layer)
        change(layer)
    own, averaged = layer.weight_hh_l0, average.module.weight_hh_l0
    assert_close(averaged * (1.5**2 / 1.25), own)
    assert_runs_its_weights(average, x)
    assert_runs_its_weights(layer, x)


def assign(layer):
    layer.load_state_dict({k: 1.5 * v for k, v in layer.state_dict().items()}, assign=True)


def set_each(layer):
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(p.detach() * 1.5))


def register_each(layer):
    for name, p in list(layer.named_parameters()):
        delattr(layer, name)
        layer.register_parameter(name, nn.Parameter(p.detach() * 1.5))


CHANGES = (change, assign, set_each, register_each, lambda layer: layer.float().double())


@VARIANT
@COMPILED
@pytest.mark.parametrize("called", [False, True], ids=["", "called before"])
@pytest.mark.parametrize("change", CHANGES, ids=["step", "assign", "setattr", "register", "dtype"])
def test_a_compiled_layer_runs_the_weights_of_now(variant, compiled, called, change):
    layer = TriGRU(IN, H, variant=variant, dtype=F64)
    function, x = compiled(layer), torch.randn(T, B, IN, dtype=F64)
    if called:
        function(x)
    for _ in range(3):
        change(layer)
        assert_runs_its_weights(function, x)


def test_copies_of_a_parametrised_layer(form):
    """Before and after a call, which may leave no weights that were computed."""
    layer = parametrizations.weight_norm(TriGRU(IN, H, variant=form, dtype=F64), "weight_hh_l0")
    x = torch.randn(T, B, IN, dtype=F64)
    for _ in range(2):
        other = copy.deepcopy(layer)
        assert_close(other(x), layer(x), rtol=0, atol=0)
        with torch.no_grad():
            other.parametrizations.weight_hh_l0.original0.mul_(2)
        assert not other(x)[0].equal(layer(x)[0])


# torch.fx


class Nest(nn.Module):
    """Calls of every kind."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.first = nn.ModuleDict({"gru": kind(IN, H, **settings)})
        self.again = kind(H, H, **settings)

    def forward(self, x, hx=None):
        y, h = self.first["gru"](x)
        y, h = self.again(input=y, hx=2 * h)
        y, h = self.again(y)
        y, h = self.again(y, hx)
        return 2 * y, h


def calls_of(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


@VARIANT
def test_a_leaf_of_torch_fx(variant):
    model = Nest(TriGRU, variant=variant)
    traced = fx.symbolic_trace(model)
    theirs = fx.symbolic_trace(Nest(nn.GRU))
    assert calls_of(traced) == calls_of(theirs) == ["first.gru", *3 * ["again"]]
    x, hx = torch.randn(T, B, IN), torch.randn(1, B, H)
    for args in ((x,), (x, hx)):
        exact = model(*args)
        for each in (
            traced,
            copy.deepcopy(traced),
            from_file(traced),
            fx.symbolic_trace(traced),
            fx.Transformer(traced).transform(),
        ):
            assert_close(each(*args), exact, rtol=0, atol=0)
    grads = [torch.autograd.grad(m(x)[0].sum(), list(model.parameters())) for m in (traced, model)]
    assert_close(*grads, rtol=0, atol=0)


class Keeps(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def test_a_parametrised_leaf_of_torch_fx(form):
    layer = parametrizations.weight_norm(TriGRU(IN, H, variant=form), "weight_hh_l0")
    model, seen = Keeps(layer), []
    layer.register_full_backward_hook(lambda *_: seen.append(1))
    traced, x = fx.symbolic_trace(model), torch.randn(T, B, IN, requires_grad=True)
    assert_close(traced(x), model(x), rtol=0, atol=0)
    traced(x).sum().backward()
    assert seen == [1]


class Leaves(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, TriGRU) or super().is_leaf_module(m, module_qualified_name)


class Doubling(TriGRU):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def own_forward():
    layer = TriGRU(IN, H)
    inner = layer.forward
    layer.forward = lambda input, hx=None: inner(2 * input, hx)
    return layer


def hooked(register):
    layer = TriGRU(IN, H)
    getattr(layer, register)(lambda *_: None)
    return layer


TWICE = {
    "pruned": lambda: prune.l1_unstructured(TriGRU(IN, H), "weight_hh_l0", 0.5),
    "subclass": lambda: Doubling(IN, H),
    "own forward": own_forward,
    "hook": lambda: hooked("register_forward_hook"),
    "hook before": lambda: hooked("register_forward_pre_hook"),
    "hook of backward": lambda: hooked("register_backward_hook"),
}


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("case", TWICE)
def test_what_a_traced_model_would_run_twice(case):
    """It is refused, and harms nothing; a Tracer that knows the leaf from the start takes it."""
    model, x = Keeps(TWICE[case]()), torch.randn(T, B, IN)
    exact = model(x)
    with pytest.raises(
        fx.proxy.TraceError, match="would run the hooks of the TriGRU 'layer' twice"
    ):
        fx.symbolic_trace(model)
    assert_close(model(x), exact, rtol=0, atol=0)
    traced = fx.GraphModule(model, Leaves().trace(model))
    assert_close(traced(x), exact, rtol=0, atol=0)


def test_torch_fx_traces_no_layer_itself():
    for layer in (nn.GRU(IN, H), TriGRU(IN, H)):
        with pytest.raises(fx.proxy.TraceError):
            fx.symbolic_trace(layer)


@VARIANT
@pytest.mark.parametrize(
    "mapping",
    [get_default_qconfig_mapping("x86"), QConfigMapping().set_global(default_dynamic_qconfig)],
    ids=["static", "dynamic"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:.*reduce_range")
def test_a_model_that_is_quantized(variant, mapping):
    """The layer stays as it is in what prepare_fx makes of the model, and convert_fx after it."""
    model = nn.Sequential(nn.Linear(IN, IN), Keeps(TriGRU(IN, H, variant=variant))).eval()
    x = torch.randn(T, B, IN)
    prepared = quantize_fx.prepare_fx(model, mapping, (x,))
    assert_close(prepared(x), model(x))
    converted = quantize_fx.convert_fx(prepared)
    layer = converted.get_submodule("1.layer")
    assert type(layer) is TriGRU and layer.variant == variant
    assert type(converted.get_submodule("0")) is not nn.Linear
    assert (converted(x) - model(x)).abs().max() < 0.05


def test_a_layer_of_an_older_file_keeps_no_weights_alive():
    """nn.RNNBase's own list of weights is in what earlier versions pickled."""
    layer = TriGRU(3, 4)
    state = {**layer.__getstate__(), "_flat_weights": list(layer.parameters())}
    old = TriGRU.__new__(TriGRU)
    old.__setstate__(state)
    assert "_flat_weights" not in vars(old)
    x = torch.randn(2, 1, 3)
    assert torch.equal(old(x)[0], layer(x)[0])


@pytest.mark.parametrize("variant", ["torch", "textbook"])
def test_compiled_autograd(variant):
    layer, x = TriGRU(3, 4, variant=variant), torch.randn(5, 2, 3)
    layer(x)[0].square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        layer(x)[0].square().sum().backward()
    torch.testing.assert_close([p.grad for p in layer.parameters()], expected)
