"""The layer under the transforms of torch.func, deterministic algorithms and torch.export."""

import copy
import io

import pytest
import torch
from layers import (
    BF16,
    F64,
    IN,
    STACK,
    VARIANT,
    H,
    T,
    as_it_is,
    believing_in_kernels,
    data_of,
    expected,
    in_double,
    make_hx,
    pack,
    packed_case,
    results,
    textbook,
    unsorted,
)
from numerics import assert_within_rule
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from trigru import TriGRU

# The transforms of torch.func


class Problem:
    """Weights w, x and hx of one call, in two ways: `ours(w, x, hx)` and, by hand, `theirs`; and
    much that a transform needs."""

    def __init__(self, variant, batch_first=False):
        settings = STACK | {"batch_first": batch_first, "variant": variant, "dtype": F64}
        self.layers = [TriGRU(2, 3, **settings) for _ in range(3)]
        self.layer = self.layers[0]
        self.w = {name: p.detach() for name, p in self.layer.named_parameters()}
        self.ws = {n: p.detach() for n, p in stack_module_state(self.layers)[0].items()}
        self.x = torch.randn((2, 3, 2) if batch_first else (3, 2, 2), dtype=F64)
        self.hx = torch.randn(4, 2, 3, dtype=F64)
        self.dw, self.dx, self.dhx = self.like(self.w), self.like(self.x), self.like(self.hx)
        self.row, self.row_hx = torch.randn(3, 2, dtype=F64), torch.randn(4, 3, dtype=F64)
        self.packed = pack((2, 1, 3), enforce_sorted=False)(torch.randn(3, 3, 2, dtype=F64))
        self.data, self.packed_hx = self.packed.data, torch.randn(4, 3, 3, dtype=F64)

    def like(self, value):
        if isinstance(value, dict):
            return {name: torch.randn_like(each) for name, each in value.items()}
        return torch.randn_like(value)

    def many(self, tensor, dim=0):
        """Three tensors like this one, along a new `dim`."""
        return torch.randn(3, *tensor.shape, dtype=F64).movedim(0, dim)

    def ours(self, w, x, hx=None):
        return functional_call(self.layer, w, (x, hx))

    def theirs(self, w, x, hx=None):
        return textbook(self.layer, w, x, hx)

    def of_data(self, function):
        """`function` of the rows of the packed sequence."""

        def of_data(w, data, hx=None):
            output, h_n = function(w, self.packed._replace(data=data), hx)
            return output.data, h_n

        return of_data


def loss(f):
    def function(*args):
        output, h_n = f(*args)
        return output.square().sum() + h_n.sin().sum()

    return function


def of_x(f, p):
    return lambda x: f(p.w, x, p.hx)


def with_weight_of(f, p, name):
    return lambda weight: f(p.w | {name: weight}, p.x, p.hx)


def pulled_back(f, p):
    outputs, pull = vjp(f, p.w, p.x, p.hx)
    return outputs, pull(tuple(o.cos() for o in outputs))


ALL = (0, 1, 2)
DERIVATIVES = {
    "grad": lambda f, p: grad(loss(f), ALL)(p.w, p.x, p.hx),
    "grad without hx": lambda f, p: grad(loss(f), (0, 1))(p.w, p.x),
    "grad, unbatched": lambda f, p: grad(loss(f), ALL)(p.w, p.row, p.row_hx),
    "grad of x alone": lambda f, p: grad(loss(of_x(f, p)))(p.x),
    "grad of weights alone": lambda f, p: grad(loss(f))(p.w, p.x, p.hx),
    "grad of grad": lambda f, p: grad(lambda x: grad(loss(of_x(f, p)))(x).square().sum())(p.x),
    "vjp": pulled_back,
    "jvp": lambda f, p: jvp(f, (p.w, p.x, p.hx), (p.dw, p.dx, p.dhx)),
    "jvp, unbatched": lambda f, p: jvp(f, (p.w, p.row), (p.dw, p.row.cos())),
    "jvp of x alone": lambda f, p: jvp(of_x(f, p), (p.x,), (p.dx,)),
    "jvp of hx alone": lambda f, p: jvp(lambda hx: f(p.w, p.x, hx), (p.hx,), (p.dhx,)),
    "jvp of a weight alone": lambda f, p: jvp(
        with_weight_of(f, p, "weight_hh_l0"), (p.w["weight_hh_l0"],), (p.dw["weight_hh_l0"],)
    ),
    "jvp of grad": lambda f, p: jvp(grad(loss(f), ALL), (p.w, p.x, p.hx), (p.dw, p.dx, p.dhx)),
    "grad of jvp": lambda f, p: grad(
        lambda x: jvp(lambda w: loss(f)(w, x, p.hx), (p.w,), (p.dw,))[1]
    )(p.x),
    "jvp of jvp": lambda f, p: jvp(lambda x: jvp(of_x(f, p), (x,), (x.cos(),))[1], (p.x,), (p.dx,)),
    "jacrev": lambda f, p: jacrev(f, (1, 2))(p.w, p.x, p.hx),
    "jacrev of weights": lambda f, p: jacrev(f)(p.w, p.x, p.hx),
    "jacrev in chunks": lambda f, p: jacrev(of_x(f, p), chunk_size=5)(p.x),
    "jacfwd": lambda f, p: jacfwd(f, (1, 2))(p.w, p.x, p.hx),
    "jacfwd of weights": lambda f, p: jacfwd(f)(p.w, p.x, p.hx),
    "hessian": lambda f, p: hessian(loss(f), (1, 2))(p.w, p.x, p.hx),
    "hessian of a bias": lambda f, p: hessian(loss(with_weight_of(f, p, "bias_ih_l1")))(
        p.w["bias_ih_l1"]
    ),
    "jacrev of jacrev": lambda f, p: jacrev(jacrev(loss(of_x(f, p))))(p.x),
    "jacrev of jacfwd": lambda f, p: jacrev(jacfwd(loss(of_x(f, p))))(p.x),
    "jacfwd of jacfwd": lambda f, p: jacfwd(jacfwd(loss(of_x(f, p))))(p.x),
}


@VARIANT
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_torch_func(variant, derivative):
    problem = Problem(variant)
    actual, exact = (DERIVATIVES[derivative](f, problem) for f in (problem.ours, problem.theirs))
    assert_close(actual, exact)


@VARIANT
def test_linearize(variant):
    p = Problem(variant)
    output, push = linearize(p.ours, p.w, p.x, p.hx)
    exact = jvp(p.theirs, (p.w, p.x, p.hx), (p.dw, p.dx, p.dhx))
    assert_close((output, push(p.dw, p.dx, p.dhx)), exact)


@VARIANT
def test_forward_mode(variant):
    """torch.autograd.forward_ad by itself, where ATen's GRU may compute the one form."""
    p, both = Problem(variant), []
    for f in (p.ours, p.theirs):
        with forward_ad.dual_level():
            w = {name: forward_ad.make_dual(each, p.dw[name]) for name, each in p.w.items()}
            outputs = f(w, forward_ad.make_dual(p.x, p.dx), p.hx)
            both.append([tuple(forward_ad.unpack_dual(o)) for o in outputs])
    assert_close(*both)


BATCHED = {  # what vmap calls, and with what
    "x at 0": lambda f, p: vmap(of_x(f, p))(p.many(p.x)),
    "x at 1": lambda f, p: vmap(of_x(f, p), 1)(p.many(p.x, 1)),
    "x at 2": lambda f, p: vmap(of_x(f, p), 2)(p.many(p.x, 2)),
    "x at -1": lambda f, p: vmap(of_x(f, p), -1)(p.many(p.x, -1)),
    "x to 1": lambda f, p: vmap(of_x(f, p), out_dims=1)(p.many(p.x)),
    "x without hx": lambda f, p: vmap(lambda x: f(p.w, x))(p.many(p.x)),
    "x alone": lambda f, p: vmap(of_x(f, p))(p.many(p.x)[:1]),
    "x in chunks": lambda f, p: vmap(of_x(f, p), chunk_size=2)(p.many(p.x)),
    "hx": lambda f, p: vmap(lambda hx: f(p.w, p.x, hx), 1)(p.many(p.hx, 1)),
    "x and hx": lambda f, p: vmap(f, (None, 0, 2))(p.w, p.many(p.x), p.many(p.hx, 2)),
    "unbatched x at 0": lambda f, p: vmap(lambda x: f(p.w, x))(p.many(p.row)),
    "unbatched x at 1": lambda f, p: vmap(lambda x: f(p.w, x), 1)(p.many(p.row, 1)),
    "unbatched x and hx": lambda f, p: vmap(f, (None, 1, 1))(
        p.w, p.many(p.row, 1), p.many(p.row_hx, 1)
    ),
    "weights": lambda f, p: vmap(f, (0, None, None))(p.ws, p.x, p.hx),
    "weights, unbatched": lambda f, p: vmap(f, (0, None, None))(p.ws, p.row, p.row_hx),
    "weights and x": lambda f, p: vmap(f, (0, 1))(p.ws, p.many(p.x, 1)),
    "weights, x and hx": lambda f, p: vmap(f, (0, 1, 2))(p.ws, p.many(p.x, 1), p.many(p.hx, 2)),
    "w_hh of a layer": lambda f, p: vmap(with_weight_of(f, p, "weight_hh_l1"))(
        p.ws["weight_hh_l1"]
    ),
    "w_ih of a layer": lambda f, p: vmap(with_weight_of(f, p, "weight_ih_l0"))(
        p.ws["weight_ih_l0"]
    ),
    "w_hh at 2": lambda f, p: vmap(with_weight_of(f, p, "weight_hh_l0"), 2)(
        p.ws["weight_hh_l0"].permute(1, 2, 0).contiguous()
    ),
    "a bias": lambda f, p: vmap(with_weight_of(f, p, "bias_ih_l0_reverse"))(
        p.ws["bias_ih_l0_reverse"]
    ),
    "x of x": lambda f, p: vmap(vmap(of_x(f, p), 1))(p.many(p.many(p.x, 1))),
    "weights of x": lambda f, p: vmap(vmap(f, (None, 0)), (0, None))(p.ws, p.many(p.x)),
    "x of weights": lambda f, p: vmap(vmap(f, (0, None)), (None, 0))(p.ws, p.many(p.x)),
    "grad": lambda f, p: vmap(grad(loss(f)), (None, 0))(p.w, p.many(p.x)),
    "grad, unbatched": lambda f, p: vmap(grad(loss(f), ALL), (None, 1, 1))(
        p.w, p.many(p.row, 1), p.many(p.row_hx, 1)
    ),
    "grad of weights": lambda f, p: vmap(grad(loss(f), ALL), (0, None, 0))(p.ws, p.x, p.many(p.hx)),
    "grad of vmap": lambda f, p: grad(lambda w: vmap(loss(f), (0, None))(w, p.x).sum())(p.ws),
    "grad of grad": lambda f, p: vmap(
        grad(lambda x: grad(loss(f), 1)(p.w, x).square().sum())
    )(p.many(p.row)),
    "jvp": lambda f, p: vmap(lambda x, dx: jvp(lambda x: f(p.w, x), (x,), (dx,)), (1, 0))(
        p.many(p.row, 1), p.many(p.row)
    ),
    "jvp of weights": lambda f, p: vmap(lambda w: jvp(lambda w: f(w, p.x), (w,), (p.dw,)))(p.ws),
    "hessian": lambda f, p: vmap(hessian(loss(f), 1), (None, 0))(p.w, p.many(p.row[:2])),
}  # fmt: skip


@VARIANT
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize("batched", BATCHED)
def test_vmap(variant, batch_first, batched):
    problem, both = Problem(variant, batch_first), []
    for f in (problem.ours, problem.theirs):
        torch.manual_seed(1)
        both.append(BATCHED[batched](f, problem))
    assert_close(*both)


PACKED_TRANSFORMS = {
    "grad": lambda f, p: grad(loss(f), ALL)(p.w, p.data, p.packed_hx),
    "jvp": lambda f, p: jvp(f, (p.w, p.data, p.packed_hx), (p.dw, p.data.cos(), p.packed_hx.cos())),
    "jacrev": lambda f, p: jacrev(f, (1, 2))(p.w, p.data, p.packed_hx),
    "jacfwd": lambda f, p: jacfwd(f, (1, 2))(p.w, p.data, p.packed_hx),
    "hessian": lambda f, p: hessian(loss(f), (1, 2))(p.w, p.data, p.packed_hx),
    "data": lambda f, p: vmap(f, (None, 0, None))(p.w, p.many(p.data), p.packed_hx),
    "data at 1": lambda f, p: vmap(f, (None, 1))(p.w, p.many(p.data, 1)),
    "hx": lambda f, p: vmap(f, (None, None, 2))(p.w, p.data, p.many(p.packed_hx, 2)),
    "data, hx": lambda f, p: vmap(f, (None, 1, 0))(p.w, p.many(p.data, 1), p.many(p.packed_hx)),
    "weights": lambda f, p: vmap(f, (0, None, None))(p.ws, p.data, p.packed_hx),
    "weights, data": lambda f, p: vmap(f, (0, 1, None))(p.ws, p.many(p.data, 1), p.packed_hx),
    "weights of data": lambda f, p: vmap(vmap(f, (None, 0)), (0, None))(p.ws, p.many(p.data)),
    "vmap of grad": lambda f, p: vmap(grad(loss(f), (0, 1)), (None, 0))(p.w, p.many(p.data)),
    "vmap of weights' grad": lambda f, p: vmap(grad(loss(f), (0, 1)), (0, None))(p.ws, p.data),
}  # fmt: skip


@VARIANT
@pytest.mark.parametrize("transform", PACKED_TRANSFORMS)
def test_transforms_of_packed_calls(variant, transform):
    problem, both = Problem(variant), []
    for f in (problem.ours, problem.theirs):
        torch.manual_seed(1)
        both.append(PACKED_TRANSFORMS[transform](problem.of_data(f), problem))
    assert_close(*both)


@VARIANT
def test_an_ensemble_is_its_members(variant):
    """As torch.func's own recipe has it, beside a loop over the layers without any transform."""
    problem = Problem(variant)
    parameters, buffers = stack_module_state(problem.layers)
    base = copy.deepcopy(problem.layer).to("meta")
    xs = problem.many(problem.x)

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    actual = vmap(call)(parameters, buffers, xs)
    exact = [layer(x) for layer, x in zip(problem.layers, xs, strict=True)]
    for each, loop in zip(actual, zip(*exact, strict=True), strict=True):
        assert_close(each, torch.stack(loop))
    actual[0].square().sum().backward()
    sum(y.square().sum() for y, _ in exact).backward()
    for name, p in parameters.items():
        assert_close(p.grad, torch.stack([m.get_parameter(name).grad for m in problem.layers]))


@VARIANT
def test_vmap_of_a_call_with_dropout(variant):
    layer = TriGRU(IN, H, num_layers=2, dropout=0.5, variant=variant)
    xs = torch.randn(T, 1, IN).expand(3, T, 1, IN)
    different = vmap(layer, randomness="different")(xs)[0]
    assert not torch.allclose(different[0], different[1])
    same = vmap(layer, randomness="same")(xs)[0]
    assert_close(same[0], same[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(xs)


@VARIANT
def test_vmap_under_autocast(variant):
    layer = TriGRU(IN, 16, **STACK, variant=variant)
    xs = torch.randn(3, T, 16, IN)
    double, doubles = in_double(layer, xs)

    def named(outputs):
        return dict(zip(("output", "h_n"), outputs, strict=True))

    def loop(function, xs):
        return named(map(torch.stack, zip(*map(function, xs), strict=True)))

    with torch.autocast("cpu", BF16):
        actual = named(vmap(layer)(xs))
    exact = loop(expected(double), doubles)
    assert_within_rule(actual, exact, loop(expected(layer, dtype=BF16), xs))


# The older ways: torch.autograd's own vmap, and expanded weights


PER_SAMPLE = pytest.mark.parametrize(
    "settings, packed",
    [({"batch_first": True}, False), (STACK | {"batch_first": True}, False), ({}, True)],
    ids=["one", "stack", "packed"],
)


def per_sample_call(layer, packed):
    x, lengths = torch.randn(3, T, IN, dtype=F64), torch.tensor([T, 2, 1])
    if packed:
        x = pack_padded_sequence(x, lengths, batch_first=True)
    return call_for_per_sample_grads(layer, batch_size=3, loss_reduction="sum")(x)


@PER_SAMPLE
def test_expanded_weights(monkeypatch, settings, packed):
    """Through ATen's GRU wherever the layer is, as with nn.GRU."""
    monkeypatch.setattr("trigru.layer.ops", believing_in_kernels())
    layer = TriGRU(IN, H, **settings, dtype=F64)
    samples = []
    for each in (layer, copy.deepcopy(layer).to_torch()):
        torch.manual_seed(1)
        output, h_n = per_sample_call(each, packed)
        (data_of(output).square().sum() + h_n.sin().sum()).backward()
        samples.append({name: p.grad_sample for name, p in each.named_parameters()})
    assert all(s.shape[0] == 3 and s.any() for s in samples[0].values())
    assert_close(*samples)


@PER_SAMPLE
def test_expanded_weights_of_the_textbook_form(settings, packed):
    layer = TriGRU(IN, H, **settings, variant="textbook", dtype=F64)
    layer.weight_ih_l0.requires_grad_(False)  # and so not expanded
    with pytest.raises(NotImplementedError, match=r"not the textbook variant, .* torch.func.vmap"):
        per_sample_call(layer, packed)


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize("arrange", [as_it_is, unsorted], ids=["dense", "packed"])
def test_gradients_in_batches(form, batch_first, arrange):
    layer = TriGRU(IN, H, **STACK, batch_first=batch_first, variant=form, dtype=F64)
    x, hx = (t.requires_grad_() for t in packed_case(layer, unsorted))
    output, h_n = layer(arrange(x), hx)
    outputs, inputs = (data_of(output), h_n), [x, hx, *layer.parameters()]
    batch = [torch.randn(3, *t.shape, dtype=F64) for t in outputs]
    how = {"retain_graph": True}
    actual = torch.autograd.grad(outputs, inputs, batch, is_grads_batched=True, **how)
    each = [torch.autograd.grad(outputs, inputs, one, **how) for one in zip(*batch, strict=True)]
    assert_close(actual, tuple(map(torch.stack, zip(*each, strict=True))))


def test_vectorized_jacobian_and_hessian(form):
    p = Problem(form)
    for derivative in (
        lambda f, v: torch.autograd.functional.jacobian(of_x(f, p), p.x, vectorize=v),
        lambda f, v: torch.autograd.functional.hessian(loss(of_x(f, p)), p.x, vectorize=v),
        lambda f, v: torch.autograd.functional.hessian(
            loss(with_weight_of(f, p, "bias_ih_l1")), p.w["bias_ih_l1"], vectorize=v
        ),
    ):
        assert_close(derivative(p.ours, True), derivative(p.theirs, False))


# Deterministic algorithms


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("arrange", [as_it_is, unsorted], ids=["dense", "packed"])
def test_same_bits_every_time(deterministic, form, arrange):
    layer = TriGRU(24, 48, **STACK, dropout=0.5, variant=form)
    case, runs = packed_case(layer), []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append(results(layer, layer, *case, arrange=arrange))
    for again in runs[1:]:
        assert_close(again, runs[0], rtol=0, atol=0)


# Counting


@pytest.mark.parametrize("arrange", [as_it_is, unsorted], ids=["dense", "packed"])
def test_flops(form, arrange):
    """As many as of nn.GRU, whose products have the textbook form's sizes."""
    layer = TriGRU(IN, H, **STACK, variant=form)
    x, hx = (t.requires_grad_() for t in packed_case(layer))
    counts = []
    for each in (layer, torch.nn.GRU(IN, H, **STACK)):
        with FlopCounterMode(display=False) as counter:
            output, h_n = each(arrange(x), hx)
            forwards = counter.get_total_flops()
            (data_of(output).sum() + h_n.sum()).backward()
        counts.append((forwards, counter.get_total_flops()))
    assert counts[0] == counts[1] and min(counts[0]) > 0


# torch.export


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators(program):
    return sum(node.target is torch.ops.trigru.forward.default for node in program.graph.nodes)


LONG = {"num_layers": 3, "batch_first": True}


@VARIANT
@pytest.mark.parametrize(
    "settings, with_hx, strict, mode",
    [
        (STACK, True, False, torch.enable_grad),
        (STACK, True, True, torch.no_grad),
        (LONG, False, True, torch.enable_grad),
        (LONG, False, False, torch.no_grad),
    ],
    ids=["grad", "strict-no_grad", "strict-grad", "no_grad"],
)
def test_export(fresh_dynamo, variant, settings, with_hx, strict, mode):
    layer = TriGRU(IN, H, **settings, variant=variant, dtype=F64).eval()

    def inputs(steps, count):
        shape = (count, steps, IN) if layer.batch_first else (steps, count, IN)
        x = torch.randn(shape, dtype=F64)
        return (x, make_hx(layer, count)) if with_hx else (x,)

    steps, count = torch.export.Dim("steps"), torch.export.Dim("count")
    x_dims = {0: count, 1: steps} if layer.batch_first else {0: steps, 1: count}
    with mode():
        program = torch.export.export(
            layer, inputs(T, 3), dynamic_shapes=(x_dims, {1: count})[: 1 + with_hx], strict=strict
        )
        assert operators(program) == layer.num_layers
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for module in (program.module(), torch.export.load(file).module()):
            for sizes in ((T, 3), (2, 7), (11, 2)):
                case = inputs(*sizes)
                assert_close(module(*case), expected(layer)(*case))


@VARIANT
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_gradients_of_an_exported_layer(fresh_dynamo, variant, mode):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64)
    case = packed_case(layer)
    with mode():
        module = torch.export.export(layer, case).module()
    assert_close(results(module, module, *case), results(expected(layer), layer, *case))


@VARIANT
def test_export_of_an_unbatched_call(fresh_dynamo, variant):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64)
    example, other = ((torch.randn(n, IN, dtype=F64), make_hx(layer)) for n in (T, T + 4))
    dims = {0: torch.export.Dim("steps")}, None
    program = torch.export.export(layer, example, dynamic_shapes=dims)
    assert operators(program) == layer.num_layers
    assert_close(program.module()(*other), expected(layer)(*other))
