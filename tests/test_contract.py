"""The whole of nn.GRU's contract, item by item: PyTorch's own module tests, packed sequences,
errors, the transforms of torch.func, export. What a dense call computes is in test_layer."""

import copy
import io
import itertools
import math
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_rule
from torch import nn
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
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from torch.testing import assert_close

from trigru import TriGRU, ops
from trigru.plan import DeviceLimits

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


@pytest.fixture(params=["aten", "ops", "textbook"])
def form(request, monkeypatch):
    """The variant, and for nn.GRU's form whether ATen's or our own operators compute it: the
    latter do where there is a kernel, so let the layer, but not the operators, believe in one."""
    if request.param == "ops":
        monkeypatch.setattr("trigru.layer.ops", believing_in_kernels())
    return "textbook" if request.param == "textbook" else "torch"


def believing_in_kernels():
    return SimpleNamespace(**vars(ops) | {"why_no_kernel": lambda *args: None})


def by_hand(layer, weights, x, hx=None):
    """Either equation, written down once more, over x (T, …, I) from hx (layers · D, …, H): the
    library has no part in it, and every transform of torch.func knows all that it is made of."""
    D = 2 if layer.bidirectional else 1
    if hx is None:
        hx = x.new_zeros(layer.num_layers * D, *x.shape[1:-1], layer.hidden_size)
    h_n = []
    for k in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(("", "_reverse")[:D]):
            w_ih, w_hh, b_ih, b_hh = (weights.get(f"{kind}_l{k}{suffix}") for kind in KINDS)
            h, y = hx[k * D + d], {}
            for t in range(len(x))[:: -1 if d else 1]:
                gx_r, gx_z, gx_n = F.linear(x[t], w_ih, b_ih).chunk(3, -1)
                gh_r, gh_z, gh_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
                r, z = torch.sigmoid(gx_r + gh_r), torch.sigmoid(gx_z + gh_z)
                if layer.variant == "textbook":
                    n = torch.tanh(gx_n + F.linear(r * h, w_hh.chunk(3)[2]))
                    h = (1 - z) * h + z * n
                else:
                    n = torch.tanh(gx_n + r * gh_n)
                    h = (1 - z) * n + z * h
                y[t] = h
            outputs.append(torch.stack([y[t] for t in range(len(x))]))
            h_n.append(h)
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n)


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


# PyTorch's own module tests

SAMPLES = """
import sys, types, unittest
import torch
try:
    import expecttest
except ImportError:  # not needed for what is wanted here
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

def arguments(call):
    return None if call is None else (call.args, call.kwargs)

(info,) = (info for info in module_db if info.module_cls is torch.nn.GRU)
samples = {}
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(0)
    how = dict(device="cpu", dtype=dtype, requires_grad=False, training=True)
    samples[dtype] = {
        "inputs": [
            (arguments(each.constructor_input), arguments(each.forward_input))
            for each in info.module_inputs_func(info, with_packed_sequence=True, **how)
        ],
        "errors": [
            (
                arguments(each.module_error_input.constructor_input),
                arguments(each.module_error_input.forward_input),
                each.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR,
                each.error_type.__name__,
                each.error_regex,
            )
            for each in info.module_error_inputs_func(info, **how)
        ],
    }
torch.save(samples, sys.argv[1])
"""


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """The samples of PyTorch's tests of nn.GRU, by dtype. From a process of its own: importing what
    makes them forbids this one to set flags of torch.backends, and changes its environment."""
    file = tmp_path_factory.mktemp("samples") / "samples.pt"
    done = subprocess.run(
        [sys.executable, "-c", SAMPLES, str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=False)


def on(device, value):
    """`value` with all tensors and devices in it moved to `device`."""
    if isinstance(value, torch.device | str):
        return device
    if isinstance(value, torch.Tensor | PackedSequence):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on(device, each) for key, each in value.items()}
    return tuple(on(device, each) for each in value) if isinstance(value, tuple) else value


def results_of_samples(samples, dtype, variant, device, training):
    """(actual, exact, PyTorch's own) for each sample. cuDNN has no gradients in eval mode, so on a
    GPU PyTorch's own layer is in training; there is no dropout."""
    assert len(samples[dtype]["inputs"]) >= 32
    for (args, kwargs), (inputs, _) in samples[dtype]["inputs"]:
        theirs = nn.GRU(*args, **kwargs, device=device, dtype=dtype)
        layer = TriGRU(*args, **kwargs, variant=variant, device=device, dtype=dtype)
        layer.train(training)
        if variant == "torch":
            layer.load_state_dict(theirs.state_dict())
            theirs.train(training or device == "cuda")
        else:
            theirs = expected(layer)
        double = in_double(layer)[0].cpu()
        yield tuple(
            on(device, results_of_sample(function, owner, *each))
            for function, owner, each in (
                (layer, layer, on(device, inputs)),
                (expected(double), double, [t.to("cpu", F64) for t in inputs]),
                (theirs, layer if variant == "textbook" else theirs, on(device, inputs)),
            )
        )


def results_of_sample(function, layer, x, hx=None):
    if isinstance(x, PackedSequence):
        return results(function, layer, x.data, hx, arrange=lambda data: x._replace(data=data))
    return results(function, layer, x, hx)


TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@PRECISION
@TRAINING
def test_the_inputs_of_pytorch_s_own_tests(samples, form, dtype, training):
    triples = list(results_of_samples(samples, dtype, form, "cpu", training))
    if dtype == F64:
        for actual, _, theirs in triples:
            assert_close(actual, theirs)
    else:
        assert_all_within_rule(triples)


@pytest.fixture
def ieee():
    """No products in TF32, which cuDNN has for some of these shapes and not for others."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.filterwarnings("ignore:TriGRU falls back")
@VARIANT
@PRECISION
@TRAINING
def test_the_inputs_of_pytorch_s_own_tests_on_a_gpu(ieee, samples, variant, dtype, training):
    triples = list(results_of_samples(samples, dtype, variant, "cuda", training))
    if dtype == F64:
        for actual, exact, _ in triples:
            assert_close(actual, exact)
    else:
        assert_all_within_rule(triples)


def raised(kind, args, kwargs, call=None):
    """The type and text of what a construction and call raises, with the class under nn.GRU's name,
    and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            layer = kind(*args, **kwargs)
            if call is not None:
                call(layer)
        except Exception as error:
            outcome = type(error), str(error).replace("TriGRU", "GRU")
        else:
            outcome = None
    return outcome, [(w.category, str(w.message)) for w in caught]


@VARIANT
@PRECISION
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_errors_of_pytorch_s_own_tests(samples, variant, dtype, device):
    assert len(samples[dtype]["errors"]) >= 14
    for construction, forward, in_constructor, error_type, regex in samples[dtype]["errors"]:
        args, kwargs = on(device, construction)

        def call(layer, forward=forward):
            layer(*on(device, forward)[0])

        call = None if in_constructor else call
        ours = raised(TriGRU, args, {**kwargs, "variant": variant}, call)
        assert ours == raised(nn.GRU, args, kwargs, call)
        with pytest.raises(Exception, match=regex) as error:
            layer = TriGRU(*args, **kwargs, variant=variant)
            call(layer)
        assert error.type.__name__ == error_type


# Packed sequences


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
    "a cycle": pack((2, 3, 1), enforce_sorted=False),  # a permutation that is not its own inverse
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


# Errors


def zeros(*shape, **how):
    return torch.zeros(*shape, **how)


def each(*lengths, size=IN, **how):
    return pack_sequence([zeros(n, size, **how) for n in lengths], enforce_sorted=False)


def rows(count, *batch_sizes, dtype=torch.int64):
    return PackedSequence(zeros(count, IN), torch.tensor(batch_sizes, dtype=dtype))


ONE, ROW = (T, B, IN), (T, IN)
SORTED = pack_sequence([zeros(n, IN) for n in (4, 3, 2)])
SHUFFLED = each(4, 2, 3)
META, I64, HALF, DOUBLE = (
    {"device": "meta"}, {"dtype": torch.int64}, {"dtype": FP16}, {"dtype": F64}
)  # fmt: skip
BAD_CALLS = {  # what is not among those of test_layer; n is layers · directions
    "5-D": lambda n: (zeros(1, 1, *ONE),),
    "5-D hx": lambda n: (zeros(ONE), zeros(1, 1, n, B, H)),
    "0-D hx": lambda n: (zeros(ONE), zeros(())),
    "complex": lambda n: (zeros(ONE, dtype=torch.complex64),),
    "bool": lambda n: (zeros(ONE, dtype=torch.bool),),
    "float16": lambda n: (zeros(ONE, **HALF),),
    "float16, unbatched": lambda n: (zeros(ROW, **HALF),),
    "float64 x and hx": lambda n: (zeros(ONE, **DOUBLE), zeros(n, B, H, **DOUBLE)),
    "float64 hx": lambda n: (zeros(ONE), zeros(n, B, H, **DOUBLE)),
    "float64 hx, unbatched": lambda n: (zeros(ROW), zeros(n, H, **DOUBLE)),
    "float64 hx of other H": lambda n: (zeros(ONE), zeros(n, B, H + 1, **DOUBLE)),
    "float64 hx, no steps": lambda n: (zeros(0, IN), zeros(n, H, **DOUBLE)),
    "float16 hx": lambda n: (zeros(ONE), zeros(n, B, H, **HALF)),
    "int64 hx": lambda n: (zeros(ONE), zeros(n, B, H, **I64)),
    "rows in hx only": lambda n: (zeros(T, 0, IN), zeros(n, 3, H)),
    "3-D hx for 2-D input, no steps": lambda n: (zeros(0, IN), zeros(n, 1, H)),
    "hx is a tuple": lambda n: (zeros(ONE), (zeros(n, B, H), zeros(n, B, H))),
    "hx is a list, unbatched": lambda n: (zeros(ROW), [zeros(n, H)]),
    "hx is packed": lambda n: (zeros(ONE), SHUFFLED),
    "hx is a number": lambda n: (zeros(ONE), 0.0),
    "x is a tuple": lambda n: ((zeros(ONE), torch.tensor([B] * T)),),
    "x is an array": lambda n: (zeros(ONE).numpy(),),
    "x on meta": lambda n: (zeros(ONE, **META),),
    "x on meta, unbatched": lambda n: (zeros(ROW, **META),),
    "x on meta, hx not": lambda n: (zeros(ONE, **META), zeros(n, B, H)),
    "hx on meta": lambda n: (zeros(ONE), zeros(n, B, H, **META)),
    "hx on meta, unbatched": lambda n: (zeros(ROW), zeros(n, H, **META)),
    "hx on meta, of other H": lambda n: (zeros(ONE), zeros(n, B, H + 1, **META)),
    "no arguments": lambda n: (),
    "too many arguments": lambda n: (zeros(ONE), None, None),
    "packed, input size": lambda n: (each(4, 2, 3, size=IN + 1),),
    "packed, 3-D": lambda n: (PackedSequence(zeros(9, 1, IN), torch.tensor([3, 3, 2, 1])),),
    "packed, 1-D": lambda n: (PackedSequence(zeros(9), torch.tensor([3, 3, 2, 1])),),
    "packed, float64": lambda n: (each(4, 2, 3, **DOUBLE),),
    "packed, int64": lambda n: (each(4, 2, 3, **I64),),
    "packed, float64 and input size": lambda n: (each(4, 2, 3, size=1, **DOUBLE),),
    "packed, nothing": lambda n: (rows(0),),
    "packed, on meta": lambda n: (pack_sequence([zeros(n, IN, **META) for n in (4, 3, 2)]),),
    "packed, hx of other H": lambda n: (SHUFFLED, zeros(n, 3, H + 1)),
    "packed, hx of other layers": lambda n: (SHUFFLED, zeros(9, 3, H)),
    "packed, hx of a smaller batch": lambda n: (SHUFFLED, zeros(n, 2, H)),
    "packed, 1-D hx": lambda n: (SHUFFLED, zeros(H)),
    "packed, 2-D hx": lambda n: (SHUFFLED, zeros(n, H)),
    "packed, 4-D hx": lambda n: (SHUFFLED, zeros(n, 3, H, 1)),
    "packed, float64 hx": lambda n: (SHUFFLED, zeros(n, 3, H, **DOUBLE)),
    "packed, int64 hx": lambda n: (SHUFFLED, zeros(n, 3, H, **I64)),
    "packed, hx is a tuple": lambda n: (SHUFFLED, (zeros(n, 3, H), zeros(n, 3, H))),
    "packed, hx on meta": lambda n: (SHUFFLED, zeros(n, 3, H, **META)),
    "sorted, hx of a larger batch": lambda n: (SORTED, zeros(n, 7, H)),
    "sorted, hx of a smaller batch": lambda n: (SORTED, zeros(n, 2, H)),
    "sorted, 1-D hx": lambda n: (SORTED, zeros(H)),
    "sorted, 2-D hx": lambda n: (SORTED, zeros(n, H)),
    "sorted, 4-D hx": lambda n: (SORTED, zeros(n, 3, H, 1)),
    "sorted, hx on meta": lambda n: (SORTED, zeros(n, 3, H, **META)),
}


def outcomes(args, kwargs, form, call):
    """What nn.GRU raises, and what TriGRU does."""
    theirs = raised(nn.GRU, args, kwargs, call)
    assert theirs != (None, [])
    return theirs, raised(TriGRU, args, {**kwargs, "variant": form}, call)


def assert_same_words(ours, theirs):
    """The same exception and warnings. Where an operator further down chokes on what nn.GRU looks
    at on CUDA only, its words there will do."""
    if ours != theirs and re.match("mat1 and mat2|self and mat2|Tensor on device", theirs[0][1]):
        assert (ours[0][0], ours[1]) == (theirs[0][0], theirs[1])
        assert re.match("Input and (hidden|parameter) tensors are not (at )?the same", ours[0][1])
    else:
        assert ours == theirs


@pytest.mark.parametrize("case", BAD_CALLS)
def test_errors_of_calls(form, case):
    for settings, n in (({}, 1), (STACK, 4), ({"batch_first": True}, 1)):
        args = BAD_CALLS[case](n)
        theirs, ours = outcomes((IN, H), settings, form, lambda gru, args=args: gru(*args))
        assert_same_words(ours, theirs)


def with_weight(gru, k, change):
    """`gru` with its k-th weight changed."""
    name, weight = list(gru.named_parameters())[k]
    setattr(gru, name, nn.Parameter(change(weight.detach())))
    return gru


BAD_LAYERS = {
    "on meta": lambda gru: gru.to("meta")(zeros(ONE)),
    "on meta, unbatched": lambda gru: gru.to("meta")(zeros(ROW)),
    "on meta, no steps": lambda gru: gru.to("meta")(zeros(0, B, IN)),
    "on meta, packed": lambda gru: gru.to("meta")(SORTED),
    "a weight on meta": lambda gru: with_weight(gru, 1, lambda w: w.to("meta"))(zeros(ONE)),
    "first weight of float64": lambda gru: with_weight(gru, 0, torch.Tensor.double)(zeros(ONE)),
    "second weight of float64": lambda gru: with_weight(gru, 1, torch.Tensor.double)(zeros(ONE)),
    "unknown argument": lambda gru: gru(zeros(ONE), h0=None),
}


@pytest.mark.parametrize("case", BAD_LAYERS)
def test_errors_of_layers(form, case):
    for settings in ({}, STACK):
        theirs, ours = outcomes((IN, H), settings, form, BAD_LAYERS[case])
        assert_same_words(ours, theirs)


MALFORMED = {  # nobody looks at these before some operator further down chokes on them
    "growing batch sizes": lambda gru: gru(rows(6, 1, 2, 3)),
    "empty first step": lambda gru: gru(rows(3, 0, 2, 1)),
    "negative batch size": lambda gru: gru(rows(3, 4, -1)),
    "fewer rows than the batch sizes": lambda gru: gru(rows(3, 2, 2)),
    "batch sizes of int32": lambda gru: gru(rows(4, 2, 2, dtype=torch.int32)),
    "columns of w_ih": lambda gru: with_weight(gru, 0, lambda w: zeros(18, IN + 1))(zeros(ONE)),
    "columns of w_hh": lambda gru: with_weight(gru, 1, lambda w: zeros(18, H + 1))(zeros(ONE)),
    "rows of w_ih": lambda gru: with_weight(gru, 0, lambda w: zeros(21, IN))(zeros(ONE)),
    "rows of w_hh": lambda gru: with_weight(gru, 1, lambda w: zeros(21, H))(zeros(ONE)),
    "rows of the last bias": lambda gru: with_weight(gru, -1, lambda w: zeros(19))(zeros(ONE)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_errors_of_malformed_calls(form, case):
    """Of the same type as nn.GRU's; the text is that of the operator that chokes."""
    for settings in ({}, STACK):
        (theirs, _), (ours, _) = outcomes((IN, H), settings, form, MALFORMED[case])
        assert ours is not None, f"nn.GRU raises {theirs}"
        assert ours[0] is theirs[0]


class Launched(Exception):
    pass


@VARIANT
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_calls_launch_nothing(monkeypatch, variant, case):
    """A kernel would read and write wherever they say."""

    def launch(*args, **kwargs):
        raise Launched

    limits = DeviceLimits("a stand-in", (9, 0), 132, 227 * 1024)
    monkeypatch.setattr("trigru.ops.why_no_kernel", lambda *args: None)
    monkeypatch.setattr("trigru.ops.device_limits", lambda device: limits)
    monkeypatch.setattr("trigru.forward.launch", launch)
    with pytest.raises(Launched):
        TriGRU(IN, H, variant=variant)(SORTED)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        MALFORMED[case](TriGRU(IN, H, variant=variant))


CONSTRUCTIONS = {  # what is not among those of test_layer
    "proj_size=0": ((IN, H), {"proj_size": 0}),
    "proj_size=1": ((IN, H), {"proj_size": 1}),
    "proj_size and dropout": ((IN, H), {"proj_size": 1, "dropout": 2.0}),
    "nonlinearity": ((IN, H), {"nonlinearity": "tanh"}),
    "two unknown arguments": ((IN, H), {"first": 1, "second": 2}),
    "mode": ((IN, H), {"mode": "GRU"}),
    "bias by position": ((IN, H, 1, 0), {}),
    "batch_first by position": ((IN, H, 1, True, 0), {}),
    "dropout by position": ((IN, H, 1, True, False, 3), {}),
    "num_layers of float": ((IN, H), {"num_layers": 1.5}),
    "num_layers of str": ((IN, H), {"num_layers": "2"}),
    "num_layers of None": ((IN, H), {"num_layers": None}),
    "bias of Tensor": ((IN, H), {"bias": torch.tensor(True)}),
    "batch_first of None": ((IN, H), {"batch_first": None}),
    "dropout of nan": ((IN, H), {"dropout": float("nan")}),
    "dropout of None": ((IN, H), {"dropout": None}),
    "dropout of complex": ((IN, H), {"dropout": 1j}),
    "dtype of str": ((IN, H), {"dtype": "float32"}),
    "dtype of bool": ((IN, H), {"dtype": torch.bool}),
    "device of float": ((IN, H), {"device": 1.5}),
    "hidden_size and num_layers": ((IN, 0, 0), {}),
    "input_size and hidden_size": ((0, 0), {}),
    "bias and batch_first": ((IN, H), {"bias": 0, "batch_first": 0}),
}


@VARIANT
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_errors_of_constructors(variant, construction):
    theirs, ours = outcomes(*CONSTRUCTIONS[construction], variant, None)
    assert ours == theirs


@VARIANT
@pytest.mark.parametrize(
    "args, kwargs",
    [((), {}), ((IN,), {}), ((), {"hidden_size": H}), ((IN, H), {"input_size": IN})],
    ids=str,
)
def test_arguments_that_a_constructor_needs(variant, args, kwargs):
    """In the text the class that asks for them is another: nn.GRU leaves that to nn.RNNBase."""
    (theirs, _), (ours, _) = outcomes(args, kwargs, variant, None)
    assert ours == (theirs[0], theirs[1].replace("RNNBase", "GRU"))


@VARIANT
def test_arguments_by_position(variant):
    args = (IN, H, 2, False, True, 0.5, True)
    layer, theirs = TriGRU(*args, variant=variant), nn.GRU(*args)
    for name in nn.GRU.__constants__:
        assert getattr(layer, name) == getattr(theirs, name), name


# Batches without rows


@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
@PRECISION
def test_no_rows(form, batch_first, with_hx, dtype):
    layer = TriGRU(IN, H, **STACK, batch_first=batch_first, variant=form, dtype=dtype)
    x = zeros((0, T, IN) if batch_first else (T, 0, IN), dtype=dtype)
    hx = make_hx(layer, 0) if with_hx else None
    actual = results(layer, layer, x, hx)
    assert actual["output"].shape == (*x.shape[:2], 2 * H) and actual["h_n"].shape == (4, 0, H)
    assert_close(actual, results(expected(layer), layer, x, hx), rtol=0, atol=0)


# Parameters


def tie_layers(layer):
    for kind in KINDS[1:]:
        if hasattr(layer, f"{kind}_l0"):
            setattr(layer, f"{kind}_l1", getattr(layer, f"{kind}_l0"))


def tie_directions(layer):
    for name, p in list(layer.named_parameters()):
        if not name.endswith("_reverse"):
            setattr(layer, f"{name}_reverse", p)


def tie_kinds(layer):
    """The gates read x and h by the same weights."""
    layer.weight_hh_l0 = layer.weight_ih_l0


TIES = {
    "layers": ({"num_layers": 2}, tie_layers),
    "directions": (STACK, tie_directions),
    "x and h": ({}, tie_kinds),
}


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("arrange", [as_it_is, unsorted], ids=["dense", "packed"])
def test_tied_weights(form, tie, arrange):
    """One gradient, of all uses; still tied in a copy and after a change of dtype."""
    settings, make_one = TIES[tie]
    layer = TriGRU(H, H, **settings, variant=form, dtype=F64)
    count = len(list(layer.parameters()))
    make_one(layer)
    layer = copy.deepcopy(layer).to(FP32).to(F64)
    assert len(list(layer.parameters())) < count
    uses = dict(layer.named_parameters(remove_duplicate=False))
    assert len(uses) == count

    def all_uses(x, hx):
        if form == "textbook":
            return textbook(layer, uses, x, hx)
        return functional_call(nn.GRU(H, H, **settings, dtype=F64), uses, (x, hx))

    case = packed_case(layer)
    actual = results(layer, layer, *case, arrange=arrange)
    assert_close(actual, results(all_uses, layer, *case, arrange=arrange))


def test_some_weights_of_another_call(form):
    """functional_call with some weights, and the others as they are."""
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    x, hx = packed_case(layer)
    own = layer(x, hx)
    replaced = {"weight_hh_l1_reverse": torch.randn(3 * H, H, dtype=F64, requires_grad=True)}
    actual = functional_call(layer, replaced, (x,), {"hx": hx})
    weights = dict(layer.named_parameters()) | replaced
    if form == "torch":
        exact = functional_call(layer.to_torch(), weights, (x, hx))
    else:
        exact = textbook(layer, weights, x, hx)
    assert_close(actual, exact)
    assert_close(*(torch.autograd.grad(y.sum(), *replaced.values()) for y, _ in (actual, exact)))
    assert_close(layer(x, hx), own, rtol=0, atol=0)


@SETTINGS
@VARIANT
def test_weights_as_nn_gru_lists_them(variant, settings):
    layer, theirs = TriGRU(IN, H, **settings, variant=variant), nn.GRU(IN, H, **settings)
    names = [n for n in theirs._flat_weights_names if variant == "torch" or "bias_hh" not in n]
    assert layer._flat_weights_names == names
    assert [n for each in layer._all_weights for n in each] == names
    assert len(layer.all_weights) == len(theirs.all_weights)
    for step in (
        lambda: layer.double(),
        lambda: layer.load_state_dict(layer.state_dict(), assign=True),
        lambda: layer.flatten_parameters(),
        lambda: layer.reset_parameters(),
        lambda: setattr(layer, names[-1], nn.Parameter(getattr(layer, names[-1]).detach() * 2)),
        lambda: layer.to_empty(device="meta"),
    ):
        step()
        own = [getattr(layer, n) for n in names]
        listed = [p for each in layer.all_weights for p in each]
        for others in (layer.parameters(), layer._flat_weights, listed):
            assert all(a is b for a, b in zip(own, others, strict=True))


def test_flatten_parameters_changes_nothing(form):
    layer = TriGRU(IN, H, **STACK, variant=form)
    x = torch.randn(T, B, IN)
    before, places = layer(x), [p.data_ptr() for p in layer.parameters()]
    assert layer.flatten_parameters() is None
    assert [p.data_ptr() for p in layer.parameters()] == places
    assert_close(layer(x), before, rtol=0, atol=0)


def test_a_whole_layer_in_a_file(form):
    layer = TriGRU(IN, H, **STACK, dropout=0.25, variant=form, dtype=F64).eval()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert type(other) is TriGRU and repr(other) == repr(layer) and not other.training
    packed = unsorted(packed_case(layer)[0])
    assert_close(other(packed)[0].data, layer(packed)[0].data, rtol=0, atol=0)


def test_weights_with_gaps(form):
    """As they are after a transposition, or where they are part of something larger."""
    layer = TriGRU(IN, H, **STACK, variant=form, dtype=F64)
    case = packed_case(layer)
    exact = results(layer, layer, *case)
    for name, p in list(layer.named_parameters()):
        values = p.detach()
        gaps = torch.stack((values, values), -1)[:, 1]
        if p.dim() == 2:
            gaps = values.T.contiguous().T
        assert not gaps.is_contiguous()
        setattr(layer, name, nn.Parameter(gaps))
    assert_close(results(layer, layer, *case), exact)


REWORKED = {
    "weight_norm": lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer, "weight_ih_l1").eval(),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", 0.5),
}


@pytest.mark.parametrize("rework", REWORKED)
def test_reworked_weights(form, rework):
    """Weights that are computed from others before each call."""
    layer = REWORKED[rework](TriGRU(IN, H, **STACK, variant=form, dtype=F64))
    x = torch.randn(T, B, IN, dtype=F64)
    weights = {n: getattr(layer, n) for n in layer._flat_weights_names}
    actual = layer(x)
    if form == "torch":
        exact = functional_call(nn.GRU(IN, H, **STACK, dtype=F64), weights, (x,))
    else:
        exact = textbook(layer, weights, x)
    assert_close(actual, exact)
    wanted = list(layer.parameters())
    assert_close(*(torch.autograd.grad(y.sum(), wanted) for y, _ in (actual, exact)))


# Inputs with gaps


def in_order(shape, *order):
    """A tensor of `shape` whose strides are in another order."""
    made = torch.randn([shape[i] for i in order], dtype=F64)
    return made.permute([order.index(i) for i in range(len(shape))])


WITH_GAPS = {
    "transposed": lambda shape: in_order(shape, 1, 0, 2),
    "features first": lambda shape: in_order(shape, 2, 0, 1),
    "every second": lambda shape: torch.randn(*shape, 2, dtype=F64)[..., 1],
    "part of a row": lambda shape: torch.randn(*shape[:2], shape[2] + 3, dtype=F64)[..., 2:-1],
    "one for all steps": lambda shape: torch.randn(1, *shape[1:], dtype=F64).expand(shape),
    "one for all rows": lambda shape: torch.randn(shape[0], 1, shape[2], dtype=F64).expand(shape),
    "one number": lambda shape: torch.randn((), dtype=F64).expand(shape),
}


@pytest.mark.parametrize("gaps", WITH_GAPS)
@pytest.mark.parametrize(
    "arrange, batch_first",
    [(as_it_is, False), (as_it_is, True), (PACKINGS["sorted"], False)],
    ids=["", "batch first", "packed"],
)
def test_inputs_with_gaps(form, gaps, arrange, batch_first):
    layer = TriGRU(IN, H, bidirectional=True, batch_first=batch_first, variant=form, dtype=F64)
    x, hx = WITH_GAPS[gaps]((T, B, IN)), WITH_GAPS[gaps]((2, B, H))
    assert T == B and not x.is_contiguous() and not hx.is_contiguous()
    both = []
    for function in (layer, expected(layer)):
        leaves = x.detach().requires_grad_(), hx.detach().requires_grad_()
        output, h_n = function(arrange(leaves[0]), leaves[1])
        loss = data_of(output).square().sum() + h_n.sum()
        grads = torch.autograd.grad(loss, [*leaves, *layer.parameters()])
        both.append((data_of(output), h_n, *grads))
    assert_close(*both)


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
        self.packed = pack((2, 3, 1), enforce_sorted=False)(torch.randn(3, 3, 2, dtype=F64))
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
def test_gradients_of_an_exported_layer(fresh_dynamo, variant):
    layer = TriGRU(IN, H, **STACK, variant=variant, dtype=F64)
    case = packed_case(layer)
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
