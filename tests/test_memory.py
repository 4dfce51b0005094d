"""What a call keeps for its backward and what a backward makes, in units of T·B·H; single steps and
sequences in chunks, which carry nothing but the state."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from layers import (
    BF16,
    F64,
    FP32,
    IN,
    PACKINGS,
    STACK,
    VARIANT,
    B,
    H,
    T,
    as_it_is,
    believing_in_kernels,
    data_of,
    expected,
    in_double,
    make_hx,
    packed_case,
    results,
)
from numerics import assert_within_rule
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from trigru import TriGRU, gru, ops
from trigru.accuracy import differentiate, eager_loop, problem, yardsticks
from trigru.derivatives import LeanRecurrence

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
FORMS = pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])


# What a backward makes


class Made(TorchDispatchMode):
    """The tensors, views excepted, that operations make, with the operation's name."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.tensors.append((function.overloadpacket.__name__, t))
        return outputs

    def at_least(self, size):
        return [name for name, t in self.tensors if t.numel() >= size]


@FORMS
@pytest.mark.parametrize(
    "D, walk", [(1, {}), (1, {"reverse": True}), (2, {}), (4, {"heads": 2})], ids=str
)
def test_gradients_of_weights_are_made_without_copies(D, walk, textbook):
    """Nothing as large as y but the walk back's own results and, in the textbook form, the product
    of r with the states, once for each direction."""
    T, B, H = 30, 3, 2
    inputs, cotangents = problem(T, B, D, H, textbook=textbook, dtype=F64)
    inputs["w_hh"].requires_grad_()
    outputs = ops.recurrence(**inputs, textbook=textbook, **walk)
    with Made() as made:
        torch.autograd.grad(outputs, inputs["w_hh"], tuple(cotangents.values()))
    directions = 1 if D == 1 else 2
    expected = ["backward"] * (1 if textbook else 2) + ["mul"] * directions * textbook
    assert made.at_least((T - 1) * B * H * D / directions) == expected


@FORMS
@pytest.mark.parametrize("T", [1, 2, 50])
@pytest.mark.parametrize(
    "D, walk", [(1, {}), (1, {"reverse": True}), (2, {}), (4, {"heads": 2})], ids=str
)
def test_gradients_of_weights(T, D, walk, textbook):
    """T·B is less than one of the CPU's short sums, and several of them."""
    inputs, cotangents = problem(T, 3, D, 4, textbook=textbook, dtype=F64)

    def loop(gx, h0, w_hh, b_hh):
        """Each recurrence alone."""
        each = [
            eager_loop(textbook=textbook, reverse=d >= D // 2 if D > 1 else "reverse" in walk)(
                gx[:, :, d : d + 1], h0[d : d + 1], w_hh[d : d + 1],
                None if b_hh is None else b_hh[d : d + 1],
            )
            for d in range(D)
        ]  # fmt: skip
        y, h_n = zip(*each, strict=True)
        return torch.cat(y, 2), torch.cat(h_n)

    def ours(**inputs):
        return ops.recurrence(**inputs, textbook=textbook, **walk)

    assert_close(differentiate(ours, inputs, cotangents), differentiate(loop, inputs, cotangents))


@FORMS
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_gradients_of_weights_of_many_rows(dtype, textbook):
    """No sum of 16 bits is rounded on its way."""
    inputs, cotangents = problem(7, 1100, 1, 16, textbook=textbook, dtype=dtype)
    actual = differentiate(partial(ops.recurrence, textbook=textbook), inputs, cotangents)
    assert_within_rule(actual, *yardsticks(inputs, cotangents, textbook=textbook))


@FORMS
def test_gradients_of_weights_from_a_state_of_more_bits(textbook):
    inputs, cotangents = problem(9, 4, 1, 16, textbook=textbook, dtype=torch.bfloat16)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        h0 = inputs["h0"].to(dtype)
        cotangents["dh_n"] = cotangents["dh_n"].to(dtype)
        grads.append(
            differentiate(
                lambda **inputs: ops.recurrence(**inputs, textbook=textbook),
                inputs | {"h0": h0},
                cotangents,
            )
        )
    more, same = grads
    assert more["h_n"].dtype == more["dh0"].dtype == torch.float32
    for name in ("dw_hh", "db_hh")[: 1 if textbook else 2]:
        assert_close(more[name], same[name], rtol=0, atol=0)


OUTPUTS = pytest.mark.parametrize("output", [0, 1], ids=["y", "h_n"])


@FORMS
@OUTPUTS
@pytest.mark.parametrize("transformed", [False, True], ids=["", "torch.func"])
def test_an_output_that_is_not_used_has_no_zeros_for_a_gradient(transformed, output, textbook):
    T, B, H = 6, 3, 4
    inputs, _ = problem(T, B, 1, H, textbook=textbook, dtype=F64)

    def loss(gx, h0, w_hh):
        outputs = ops.recurrence(gx, h0, w_hh, inputs["b_hh"], textbook=textbook)
        return outputs[output].sin().sum()

    leaves = [inputs[name] for name in ("gx", "h0", "w_hh")]
    with Made() as made:
        if transformed:
            torch.func.grad(loss, (0, 1, 2))(*leaves)
        else:
            loss(*(t.requires_grad_() for t in leaves)).backward()
    assert "backward" in made.at_least(T * B * H)
    assert not [name for name, t in made.tensors if t.numel() >= T * B * H and not t.any()]


@FORMS
def test_weights_gradients_of_an_ensemble_of_heads(textbook):
    """vmap puts the members beside each other, so that directions alternate."""
    inputs, _ = problem(4, 2, 4, 3, textbook=textbook, dtype=F64)
    gx, h0, w_hh, _ = inputs.values()
    ws = torch.stack([w_hh, w_hh.sin(), w_hh.cos()])

    def loss(w_hh):
        y, h_n = ops.recurrence(gx, h0, w_hh, None, textbook=textbook, heads=2)
        return y.sin().sum() + h_n.square().sum()

    actual = torch.func.vmap(torch.func.grad(loss))(ws)
    assert_close(actual, torch.stack([torch.func.grad(loss)(w) for w in ws]))


@pytest.mark.parametrize("variant, bidirectional", [("torch", True), ("textbook", False)])
def test_no_number_of_steps_compiles_again(fresh_dynamo, variant, bidirectional):
    """That of two steps but one is 1 is nothing to a graph."""
    layer = TriGRU(IN, H, bidirectional=bidirectional, variant=variant, dtype=F64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for steps, rows in ((9, 7), (4, 8), (2, 3)):
        case = torch.randn(steps, rows, IN, dtype=F64), make_hx(layer, rows)
        with torch.compiler.set_stance("fail_on_recompile" if steps == 2 else "default"):
            actual = results(compiled, layer, *case)
        assert_close(actual, results(expected(layer), layer, *case))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# save="state"

EXACT = {"rtol": 0, "atol": 1e-13}  # in float64: sums of a few numbers below 10, in another order
PADDED_OR_PACKED = pytest.mark.parametrize(
    "arrange", [as_it_is, PACKINGS["unsorted"]], ids=["padded", "packed"]
)
ALL = STACK | {"heads": 2, "clip": 0.3, "learn_reset": True, "batch_first": True}
KEPT = {  # settings, and whether with resets and update_scale
    "one": ({}, False),
    "modified": ({}, True),
    "stack": (STACK | {"dropout": 0.5}, False),
    "batch first, no bias": ({"num_layers": 2, "bias": False, "batch_first": True}, False),
    "heads, clip": ({"bidirectional": True, "heads": 3, "clip": 0.2}, False),
    "learn_reset": ({"learn_reset": True}, False),
    "all": (ALL, True),
}


def both_ways(layer, function, *case, **how):
    """The results of a layer that keeps the state alone, and of the same that keeps the gates."""
    twin = copy.deepcopy(layer)
    twin.save = "gates"
    found = []
    for each in (layer, twin):
        torch.manual_seed(1)  # of dropout
        found.append(results(function(each), each, *case, **how))
    return found


@VARIANT
@PADDED_OR_PACKED
@pytest.mark.parametrize("settings, modified", KEPT.values(), ids=KEPT)
def test_the_state_alone_gives_the_same_gradients(variant, arrange, settings, modified):
    layer = TriGRU(IN, H, **settings, variant=variant, dtype=F64, save="state")
    x, hx = case_of(layer, arrange)
    if layer.learn_reset and not modified:
        hx = None  # the reset state is where the walk begins
    lead = data_of(arrange(x)).shape[:-1]
    resets = torch.rand(lead) < 0.4
    scale = torch.rand(*lead, H, dtype=F64, requires_grad=True)
    named = {"resets": resets, "update_scale": scale} if modified else {}
    actual, exact = both_ways(
        layer, lambda layer: lambda x, hx: layer(x, hx, **named), x, hx, arrange=arrange
    )
    assert_close(actual, exact, **EXACT)


def dense_case(layer):
    lead = (B, T) if layer.batch_first else (T, B)
    x = torch.randn(*lead, layer.input_size, dtype=layer.weight_ih_l0.dtype)
    return x, make_hx(layer, B)


def case_of(layer, arrange):
    return dense_case(layer) if arrange is as_it_is else packed_case(layer, arrange)


@VARIANT
def test_update_scale_s_gradient_from_the_state_alone(variant):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64, save="state")
    x, _ = dense_case(layer)
    grads = []
    for save in ("state", "gates"):
        layer.save = save
        scale = torch.rand(T, B, dtype=F64, generator=torch.Generator().manual_seed(1))
        scale.requires_grad_()
        layer(x, update_scale=scale)[0].sin().sum().backward()
        grads.append(scale.grad)
    assert_close(*grads, **EXACT)


@VARIANT
@pytest.mark.parametrize("shape", [(T, IN), (1, 1, IN), (T, 0, IN)], ids=str)
def test_edges_of_the_state_alone(variant, shape):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64, save="state")
    actual, exact = both_ways(layer, lambda layer: layer, torch.randn(shape, dtype=F64))
    assert_close(actual, exact, **EXACT)


@VARIANT
@pytest.mark.parametrize("output", [0, 1], ids=["y", "h_n"])
def test_one_output_alone_of_the_state_alone(variant, output):
    layer = TriGRU(IN, H, variant=variant, dtype=F64, save="state")
    x, _ = dense_case(layer)
    grads = []
    for save in ("state", "gates"):
        layer.save = save
        loss = layer(x)[output].sin().sum()
        grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert_close(*grads, **EXACT)


@VARIANT
@pytest.mark.parametrize("trained", ["weight_ih", "weight_hh", "bias_ih", "l1", "reverse"])
def test_frozen_parameters_and_the_state_alone(variant, trained):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64, save="state")
    for name, p in layer.named_parameters():
        p.requires_grad_(trained in name)
    x, hx = dense_case(layer)
    layer(x, hx)[0].sin().sum().backward()
    twin = copy.deepcopy(layer)
    twin.save, found = "gates", {name: p.grad for name, p in layer.named_parameters()}
    twin.zero_grad()
    twin(x, hx)[0].sin().sum().backward()
    exact = {name: p.grad for name, p in twin.named_parameters()}
    assert [name for name, grad in found.items() if grad is None] == [
        name for name, p in layer.named_parameters() if trained not in name
    ]
    for name, grad in exact.items():
        if grad is not None:
            assert_close(found[name], grad, **EXACT)


@VARIANT
@PADDED_OR_PACKED
def test_the_state_alone_in_float32(variant, arrange):
    layer = TriGRU(48, 24, **STACK, variant=variant, save="state")
    x = torch.randn(6, 24, 48)
    if arrange is not as_it_is:
        x = torch.randn(T, B, 48)
    double, x_double = in_double(layer, x)
    assert_within_rule(
        results(layer, layer, x, arrange=arrange),
        results(expected(double), double, x_double, arrange=arrange),
        results(expected(layer), layer, x, arrange=arrange),
    )


@VARIANT
def test_the_state_alone_under_autocast(variant):
    layer = TriGRU(48, 24, **STACK, variant=variant, save="state")
    x = torch.randn(6, 24, 48)

    def under_autocast(x, hx):
        with torch.autocast("cpu", BF16):
            return layer(x, hx)

    double, x_double = in_double(layer, x)
    actual = results(under_autocast, layer, x)
    assert actual["output"].dtype == BF16 and actual["weight_ih_l0"].dtype == FP32
    yardstick = results(expected(layer, dtype=BF16), layer, x)
    actual, yardstick = ({k: v.to(BF16) for k, v in r.items()} for r in (actual, yardstick))
    assert_within_rule(actual, results(expected(double), double, x_double), yardstick)


@VARIANT
def test_a_backward_under_autocast_makes_what_the_forward_made(variant):
    layer = TriGRU(IN, H, variant=variant, save="state")
    x, _ = dense_case(layer)
    grads = []
    for enabled in (False, True):
        loss = layer(x)[0].sin().sum()
        with torch.autocast("cpu", BF16, enabled=enabled):
            grads.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert_close(*grads, rtol=0, atol=0)


@VARIANT
@PADDED_OR_PACKED
@pytest.mark.parametrize(
    "settings", [{}, ALL | {"num_layers": 1, "batch_first": False}], ids=["one", "all"]
)
def test_second_derivatives_from_the_state_alone(variant, arrange, settings):
    layer = TriGRU(IN, H, **settings, variant=variant, dtype=F64, save="state")
    x, _ = case_of(layer, arrange)
    resets = torch.rand(data_of(arrange(x)).shape[:-1]) < 0.3 if settings else None
    seconds = []
    for save in ("state", "gates"):
        layer.save = save
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        output, h_n = layer(arrange(leaves[0]), resets=resets)
        loss = data_of(output).sin().sum() + h_n.square().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
        seconds.append([g.detach() for g in (*first, *second)])
    assert_close(*seconds, rtol=0, atol=1e-12)


@VARIANT
def test_second_derivatives_from_the_state_alone_by_differences(variant):
    layer = TriGRU(1, 2, variant=variant, dtype=F64, save="state")
    x = torch.randn(2, 2, 1, dtype=F64, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def function(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert "LeanRecurrence" in str(graph_of(function(x, *weights)[0]))
    assert torch.autograd.gradgradcheck(function, (x, *weights))


def graph_of(tensor):
    """All nodes of autograd's graph behind a tensor."""
    nodes, new = set(), [tensor.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            new.extend(before for before, _ in node.next_functions)
    return nodes


@VARIANT
def test_gradients_in_batches_from_the_state_alone(variant):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64, save="state")
    x, hx = (t.requires_grad_() for t in dense_case(layer))
    outputs, leaves = layer(x, hx), [x, hx, *layer.parameters()]
    batch = [torch.randn(3, *t.shape, dtype=F64) for t in outputs]
    how = {"retain_graph": True}
    actual = torch.autograd.grad(outputs, leaves, batch, is_grads_batched=True, **how)
    each = [torch.autograd.grad(outputs, leaves, one, **how) for one in zip(*batch, strict=True)]
    assert_close(actual, tuple(map(torch.stack, zip(*each, strict=True))))


def kept(layer, x):
    """What autograd keeps of a call beside the parameters, in units of T·B·H: each memory once."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # alive, or another may have its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x)
    return sum(s.nbytes() for s in storages.values()) / output.untyped_storage().nbytes()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("save", ["gates", "state"])
@VARIANT
def test_what_is_kept(monkeypatch, variant, save, layers):
    """As where a kernel runs, or ATen's GRU would keep what it wants."""
    monkeypatch.setattr("trigru.layer.ops", believing_in_kernels())
    steps, rows = 50, 3
    layer = TriGRU(H, H, layers, variant=variant, save=save)
    units = kept(layer, torch.randn(steps, rows, H))
    x, y, h0 = 1, 1, 1 / steps
    gates = 0 if save == "state" else 3 if variant == "textbook" else 4
    assert math.isclose(units, x + layers * (y + gates + h0))


@VARIANT
def test_what_is_kept_without_a_kernel(variant):
    layer = TriGRU(H, H, variant=variant, save="state")
    assert math.isclose(kept(layer, torch.randn(50, 3, H)), 2 + 1 / 50)


@VARIANT
def test_the_ordinary_way_of_a_layer_that_keeps_its_state(monkeypatch, fresh_dynamo, variant):
    """Graphs, transforms and calls without gradients."""
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64, save="state")
    x, hx = dense_case(layer)
    exact = results(expected(layer), layer, x, hx)

    def refuse(*args):
        raise AssertionError("no graph and no transform knows this function")

    monkeypatch.setattr(LeanRecurrence, "apply", refuse)
    with pytest.raises(AssertionError, match="knows this function"):
        layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, layer, x, hx), exact)
    with torch.no_grad():
        assert_close(layer(x, hx)[0], exact["output"])
    traced = torch.jit.trace(layer, (x, hx))
    assert_close(results(traced, layer, x, hx), exact)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x, hx))[0].sin().sum()

    one = torch.func.grad(loss, 1)(weights, x)
    many = torch.func.vmap(torch.func.grad(loss, 1), (None, 0))(weights, torch.stack([x, x.sin()]))
    assert_close(many[0], one)
    torch.func.jvp(lambda x: loss(weights, x), (x,), (x,))
    frozen = copy.deepcopy(layer).requires_grad_(False)
    assert_close(frozen(x, hx)[0], exact["output"])


@VARIANT
def test_a_trace_makes_gates_without_another_walk(variant):
    layer = TriGRU(IN, H, variant=variant, dtype=F64)
    case = torch.randn(T, B, 3 * H, dtype=F64), make_hx(layer, B)[0], layer.weight_hh_l0.detach()
    traced = torch.jit.trace(lambda *tensors: gru(*tensors, variant=variant), case)
    leaves = [t.clone().requires_grad_() for t in case]
    outputs = traced(*leaves)
    with Made() as made:
        torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)))
    names = [name for name, _ in made.tensors]
    assert "backward" in names and "forward" not in names


def test_saving_is_an_option_of_the_layer():
    for wrong in ("nothing", None, True):
        with pytest.raises(ValueError, match=r"save must be 'gates' or 'state', got"):
            TriGRU(IN, H, save=wrong)
    layer = TriGRU(IN, H, save="state")
    assert repr(layer).endswith(", save='state')") and "save" not in repr(TriGRU(IN, H))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.save == "state"
    old = TriGRU(IN, H)
    del vars(old)["save"]  # as in files from before there was more
    assert pickle.loads(pickle.dumps(old)).save == "gates"
    assert layer.to_torch()(torch.ones(T, B, IN))[0].shape == (T, B, H)


# Single steps

STEPPED = {  # settings, and whether with hx
    "one": ({}, True),
    "stack": ({"num_layers": 3}, True),
    "from nothing": ({"num_layers": 2}, False),
    "no bias": ({"num_layers": 2, "bias": False}, True),
    "batch first": ({"num_layers": 2, "batch_first": True}, True),
    "dropout of all": ({"num_layers": 3, "dropout": 1.0}, True),
    "heads": ({"num_layers": 2, "heads": 2}, True),
    "clip": ({"num_layers": 2, "clip": 0.2}, True),
    "learn_reset": ({"num_layers": 2, "learn_reset": True}, False),
    "all": ({"heads": 3, "clip": 0.3, "learn_reset": True, "batch_first": True}, False),
}


def step_by_step(layer, x, hx=None):
    """What `layer(x, hx)` is, by its `step`."""
    time = 1 if layer.batch_first and x.dim() == 3 else 0
    outputs = []
    for x_t in x.unbind(time):
        y_t, hx = layer.step(x_t, hx)
        outputs.append(y_t)
    return torch.stack(outputs, time), hx


def layer_and_case(variant, settings, with_hx=True, unbatched=False, dtype=F64):
    layer = TriGRU(IN, H, **settings, variant=variant, dtype=dtype)
    if layer.learn_reset:
        torch.nn.init.normal_(layer.reset_state)
    x, hx = dense_case(layer)
    if unbatched:
        x, hx = x[0] if layer.batch_first else x[:, 0], hx[:, 0]
    return layer, x, hx if with_hx else None


@VARIANT
@pytest.mark.parametrize("settings, with_hx", STEPPED.values(), ids=STEPPED)
@pytest.mark.parametrize("unbatched", [False, True], ids=["", "unbatched"])
def test_step_by_step_is_the_whole(monkeypatch, variant, settings, with_hx, unbatched):
    """Results and gradients; by `torch.gru_cell` where that computes it."""
    layer, x, hx = layer_and_case(variant, settings, with_hx, unbatched)
    calls, gru_cell = [], torch.gru_cell
    monkeypatch.setattr(torch, "gru_cell", lambda *args: calls.append(args) or gru_cell(*args))
    actual = results(lambda x, hx: step_by_step(layer, x, hx), layer, x, hx)
    assert_close(actual, results(layer, layer, x, hx), **EXACT)
    has_cells = variant == "torch" and layer.heads == 1 and layer.clip is None
    assert len(calls) == (T * layer.num_layers if has_cells else 0)


@VARIANT
def test_steps_drop_only_in_training(variant):
    settings = {"num_layers": 2, "dropout": 0.5}
    layer, x, hx = layer_and_case(variant, settings)
    assert not torch.equal(layer.step(x[0], hx)[1], layer.step(x[0], hx)[1])
    layer.eval()
    assert_close(step_by_step(layer, x, hx), layer(x, hx), **EXACT)


@VARIANT
def test_steps_under_autocast(variant):
    layer, x, hx = layer_and_case(variant, {"num_layers": 2}, dtype=FP32)
    with torch.autocast("cpu", BF16):
        actual, exact = layer.step(x[0], hx), layer(x[:1], hx)
    assert actual[0].dtype == actual[1].dtype == BF16
    assert_close(actual, (exact[0][0], exact[1]))


@VARIANT
def test_steps_of_episodes(variant):
    """A state is reset by whoever holds it."""
    layer, x, hx = layer_and_case(variant, {"num_layers": 2})
    resets = torch.rand(T, B) < 0.4
    assert resets.any()
    exact, outputs = layer(x, hx, resets=resets), []
    for x_t, begins in zip(x, resets, strict=True):
        y_t, hx = layer.step(x_t, hx.masked_fill(begins.unsqueeze(-1), 0))
        outputs.append(y_t)
    assert_close((torch.stack(outputs), hx), exact, **EXACT)


@VARIANT
def test_steps_of_no_rows(variant):
    layer, x, hx = layer_and_case(variant, {"num_layers": 2})
    y, h_n = layer.step(x[0, :0], hx[:, :0])
    assert y.shape == (0, H) and h_n.shape == (2, 0, H)


@VARIANT
@pytest.mark.parametrize("layers", [1, 2])
def test_an_output_in_place_is_not_the_state(variant, layers):
    layer, x, hx = layer_and_case(variant, {"num_layers": layers})
    with torch.no_grad():
        y, h_n = layer.step(x[0], hx)
        before = h_n.clone()
        y.zero_()
    assert_close(h_n, before, rtol=0, atol=0)


@VARIANT
def test_steps_in_transforms_and_graphs(monkeypatch, fresh_dynamo, variant):
    """Without `torch.gru_cell`, which knows none of them on CUDA."""
    layer, x, hx = layer_and_case(variant, {"num_layers": 2})
    y, h_n = layer(x[:1], hx)

    def refuse(*args):
        raise AssertionError("no gru_cell")

    monkeypatch.setattr(torch, "gru_cell", refuse)

    def function(x_t, hx):
        return layer.step(x_t, hx)

    def whole(x_t, hx):
        y, h_n = layer(x_t.unsqueeze(0), hx)
        return y.squeeze(0), h_n

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x[0], hx), (y[0], h_n))
    many = torch.func.vmap(function)(torch.stack([x[0], x[1]]), torch.stack([hx, hx]))
    assert_close(tuple(t[0] for t in many), (y[0], h_n))
    pushed = [torch.func.jvp(f, (x[0], hx), (x[1], hx.sin())) for f in (function, whole)]
    assert_close(*pushed)
    dual = []
    with forward_ad.dual_level():
        for f in (function, whole):
            outputs = f(forward_ad.make_dual(x[0], x[1]), hx)
            dual.append([forward_ad.unpack_dual(t).tangent for t in outputs])
    assert_close(*dual)


@VARIANT
def test_no_steps_of_a_second_direction(variant):
    layer = TriGRU(IN, H, bidirectional=True, variant=variant)
    with pytest.raises(ValueError, match=r"a bidirectional layer has no steps: its second"):
        layer.step(torch.zeros(B, IN))


@VARIANT
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize(
    "x_t, hx, error, text",
    [
        ((T, B, IN), None, ValueError, "Expected x_t to be 1D or 2D, got 3D"),
        ((), None, ValueError, "Expected x_t to be 1D or 2D, got 0D"),
        ((B, IN + 1), None, RuntimeError, f"input_size.*{IN + 1}"),
        ((B, IN + 1), (2, B, H), RuntimeError, f"input_size.*{IN + 1}"),
        ((IN + 1,), (2, H), RuntimeError, f"input_size.*{IN + 1}"),
        ((B, IN), (2, H), RuntimeError, "hx should also be 3-D but got 2-D"),
        ((IN,), (2, B, H), RuntimeError, "hx should also be 2-D but got 3-D"),
        ((H,), (2, H, H), RuntimeError, "hx should also be 2-D but got 3-D"),
        ((B, IN), (1, B, H), RuntimeError, r"Expected hidden size \(2, 4, 6\), got \[1, 4, 6\]"),
        ((B, IN), (3, B, H), RuntimeError, r"Expected hidden size \(2, 4, 6\), got \[3, 4, 6\]"),
        ((B, IN), (2, 1, H), RuntimeError, r"Expected hidden size \(2, 4, 6\), got \[2, 1, 6\]"),
        ((B, IN), (2, B, 1), RuntimeError, r"Expected hidden size \(2, 4, 6\), got \[2, 4, 1\]"),
        ((IN,), (1, H), RuntimeError, r"Expected hidden size \(2, 1, 6\), got \[1, 1, 6\]"),
    ],
    ids=str,
)
def test_errors_of_steps(variant, batch_first, x_t, hx, error, text):
    layer = TriGRU(IN, H, num_layers=2, batch_first=batch_first, variant=variant)
    with pytest.raises(error, match=text):
        layer.step(torch.zeros(x_t), None if hx is None else torch.zeros(hx))


@VARIANT
@pytest.mark.parametrize("change", [{"dtype": F64}, {"dtype": torch.int64}, {"device": "meta"}])
@pytest.mark.parametrize("changed", [0, 1], ids=["x_t", "hx"])
def test_steps_of_other_dtypes_and_devices(variant, changed, change):
    layer = TriGRU(IN, H, variant=variant)
    case = [torch.zeros(B, IN), torch.zeros(1, B, H)]
    case[changed] = case[changed].to(**change)
    with pytest.raises((RuntimeError, ValueError), match=r"dtype|device|meta"):
        layer.step(*case)


# Sequences in chunks


@FORMS
@pytest.mark.parametrize("dtype", [FP32, F64, BF16], ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("modified", [False, True], ids=["", "modified"])
def test_chunks_are_the_whole_bit_for_bit(modified, reverse, dtype, textbook):
    """Each from the h_n of the one before, backwards from the last one on."""
    steps, rows, width = 17, 5, 24
    inputs, _ = problem(steps, rows, 1, width, textbook=textbook, dtype=dtype)
    gx, h0 = inputs["gx"][:, :, 0], inputs["h0"][0]
    fixed = {
        "w_hh": inputs["w_hh"][0],
        "b_hh": None if textbook else inputs["b_hh"][0],
        "variant": "textbook" if textbook else "torch",
        "reverse": reverse,
    }
    of_steps = {}
    if modified:
        of_steps["resets"] = torch.rand(steps, rows) < 0.2
        of_steps["update_scale"] = torch.rand(steps, rows, width).to(dtype)
        fixed |= {"reset_state": torch.randn(width).to(dtype), "clip": 0.5}
    y, h_n = gru(gx, h0, **fixed, **of_steps)
    for state_dtype in {dtype, FP32 if dtype == BF16 else dtype}:
        h, chunks = h0.to(state_dtype), []
        ends = (0, 1, 4, 5, 13, steps)
        for part in list(map(slice, ends, ends[1:]))[:: -1 if reverse else 1]:
            y_part, h = gru(gx[part], h, **fixed, **{k: v[part] for k, v in of_steps.items()})
            assert h.dtype == state_dtype
            chunks.append(y_part)
        assert_close(torch.cat(chunks[:: -1 if reverse else 1]), y, rtol=0, atol=0)
        assert_close(h.to(dtype), h_n, rtol=0, atol=0)
