"""nn.GRU's contract, beyond what test_layer says of a dense call: PyTorch's own module tests,
errors, parameters, inputs with gaps."""

import copy
import io
import re
import subprocess
import sys
import warnings

import pytest
import torch
from layers import (
    F64,
    FP16,
    FP32,
    IN,
    KINDS,
    PACKINGS,
    PRECISION,
    SETTINGS,
    STACK,
    VARIANT,
    B,
    H,
    T,
    as_it_is,
    assert_all_within_rule,
    data_of,
    expected,
    in_double,
    make_hx,
    packed_case,
    results,
    textbook,
    unsorted,
)
from torch import nn
from torch.func import (
    functional_call,
)
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_sequence,
)
from torch.testing import assert_close

from trigru import TriGRU
from trigru.plan import DeviceLimits

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
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(compiled_ahead=False))]
)
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
