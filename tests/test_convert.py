"""Converted weights beside each format's own published equations, step by step in NumPy's float64.

What is drawn at random in a format goes through `from_…` into a layer, and what is drawn at random
in a layer goes through `to_…` into the format; each time the layer and the equations must agree."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from trigru import TriGRU, convert, ops

IN, H, T, B = 4, 3, 5, 2
F64 = torch.float64
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
DIRECTIONS = pytest.mark.parametrize("D", [1, 2], ids=["forwards", "both"])
RESET_AFTER = pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
FORMAT = pytest.mark.parametrize("name", ["keras", "onnx", "haiku", "linen", "nnx"])


def draw(*shape):
    """Large enough for every gate to matter."""
    return torch.randn(shape, dtype=F64).numpy()


def drawn_layer(**settings):
    layer = TriGRU(IN, H, dtype=F64, **settings)
    for p in layer.parameters():
        p.data.normal_()
    return layer


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def walk(step, x, h):
    """Every state (T, B, H), and the last one, of h' = step(x_t, h)."""
    y = []
    for x_t in x:
        h = step(x_t, h)
        y.append(h)
    return np.stack(y), h


def both_directions(step, steps_back, x, h0):
    """y (T, B, 2H) and h_n (2, B, H) of a walk and, over the reversed sequence, a second one."""
    y, h = walk(step, x, h0[0])
    y_back, h_back = walk(steps_back, x[::-1], h0[1])
    return np.concatenate((y, y_back[::-1]), -1), np.stack((h, h_back))


def assert_computes(layer, steps):
    """The layer computes the walk of `steps`, one function (x_t, h) → h' for each direction."""
    x, h0 = draw(T, B, IN), draw(len(steps), B, H)
    if len(steps) == 2:
        y, h_n = both_directions(*steps, x, h0)
    else:
        y, h = walk(*steps, x, h0[0])
        h_n = h[None]
    with torch.no_grad():
        actual_y, actual_h_n = layer(torch.tensor(x), torch.tensor(h0))
    assert_allclose(actual_y, y, rtol=1e-12, atol=1e-12)
    assert_allclose(actual_h_n, h_n, rtol=1e-12, atol=1e-12)


def keras_step(kernel, recurrent_kernel, bias=None, *, reset_after):
    """Keras' GRUCell: keras/src/layers/rnn/gru.py, `build` and `call`."""
    if bias is None:
        bias = np.zeros((2, 3 * H) if reset_after else 3 * H)
    input_bias, recurrent_bias = bias if reset_after else (bias, np.zeros(3 * H))

    def step(x, h):
        x_z = x @ kernel[:, :H] + input_bias[:H]
        x_r = x @ kernel[:, H : H * 2] + input_bias[H : H * 2]
        x_h = x @ kernel[:, H * 2 :] + input_bias[H * 2 :]
        z = sigmoid(x_z + h @ recurrent_kernel[:, :H] + recurrent_bias[:H])
        r = sigmoid(x_r + h @ recurrent_kernel[:, H : H * 2] + recurrent_bias[H : H * 2])
        if reset_after:
            recurrent_h = r * (h @ recurrent_kernel[:, H * 2 :] + recurrent_bias[H * 2 :])
        else:
            recurrent_h = (r * h) @ recurrent_kernel[:, H * 2 :]
        hh = np.tanh(x_h + recurrent_h)
        return z * h + (1 - z) * hh

    return step


def keras_steps(weights, D, reset_after):
    kinds = len(weights) // D
    return [
        keras_step(*weights[d * kinds : (d + 1) * kinds], reset_after=reset_after) for d in range(D)
    ]


def keras_weights(D, bias, reset_after):
    """`get_weights()` of a GRU, or of a Bidirectional: the forward layer's, then the backward's."""
    shapes = [(IN, 3 * H), (H, 3 * H)] + [(2, 3 * H) if reset_after else (3 * H,)] * bias
    return [draw(*shape) for _ in range(D) for shape in shapes]


def onnx_step(W, R, bias, *, linear_before_reset):
    """One direction of the operator: onnx.ai/onnx/operators/onnx__GRU.html, "Equations"."""
    Wz, Wr, Wh = np.split(W, 3)
    Rz, Rr, Rh = np.split(R, 3)
    Wbz, Wbr, Wbh, Rbz, Rbr, Rbh = np.split(np.zeros(6 * H) if bias is None else bias, 6)

    def step(Xt, Ht_1):
        zt = sigmoid(Xt @ Wz.T + Ht_1 @ Rz.T + Wbz + Rbz)
        rt = sigmoid(Xt @ Wr.T + Ht_1 @ Rr.T + Wbr + Rbr)
        if linear_before_reset:
            ht = np.tanh(Xt @ Wh.T + (rt * (Ht_1 @ Rh.T + Rbh)) + Wbh)
        else:
            ht = np.tanh(Xt @ Wh.T + (rt * Ht_1) @ Rh.T + Rbh + Wbh)
        return (1 - zt) * ht + zt * Ht_1

    return step


def onnx_steps(inputs):
    W, R, bias, linear_before_reset = inputs.values()
    return [
        onnx_step(
            W[d], R[d], None if bias is None else bias[d], linear_before_reset=linear_before_reset
        )
        for d in range(len(W))
    ]


def onnx_inputs(D, bias, linear_before_reset):
    return {
        "W": draw(D, 3 * H, IN),
        "R": draw(D, 3 * H, H),
        "B": draw(D, 6 * H) if bias else None,
        "linear_before_reset": linear_before_reset,
    }


def haiku_step(params):
    """hk.GRU's docstring, haiku/_src/recurrent.py; z, r, a is how its `__call__` splits them."""
    W_iz, W_ir, W_ia = np.split(params["w_i"], 3, axis=1)
    W_hz, W_hr, W_ha = np.split(params["w_h"], 3, axis=1)
    b_z, b_r, b_a = np.split(params["b"], 3)

    def step(x, h):
        z = sigmoid(x @ W_iz + h @ W_hz + b_z)
        r = sigmoid(x @ W_ir + h @ W_hr + b_r)
        a = np.tanh(x @ W_ia + (r * h) @ W_ha + b_a)
        return (1 - z) * h + z * a

    return step


def haiku_params():
    return {"w_i": draw(IN, 3 * H), "w_h": draw(H, 3 * H), "b": draw(3 * H)}


def linen_step(params):
    """nn.GRUCell's docstring, flax/linen/recurrent.py."""

    def dense(name, a):
        return a @ params[name]["kernel"] + params[name].get("bias", 0)

    def step(x, h):
        r = sigmoid(dense("ir", x) + dense("hr", h))
        z = sigmoid(dense("iz", x) + dense("hz", h))
        n = np.tanh(dense("in", x) + r * dense("hn", h))
        return (1 - z) * n + z * h

    return step


def linen_params():
    params = {name: {"kernel": draw(IN, H), "bias": draw(H)} for name in ("ir", "iz", "in")}
    params |= {name: {"kernel": draw(H, H)} for name in ("hr", "hz", "hn")}
    params["hn"]["bias"] = draw(H)
    return params


def nnx_step(params):
    """nnx.GRUCell's `__call__`, flax/nnx/nn/recurrent.py."""
    dense_i, dense_h = params["dense_i"], params["dense_h"]

    def step(x, h):
        xi_r, xi_z, xi_n = np.split(x @ dense_i["kernel"] + dense_i["bias"], 3, axis=-1)
        hh_r, hh_z, hh_n = np.split(h @ dense_h["kernel"], 3, axis=-1)
        r = sigmoid(xi_r + hh_r)
        z = sigmoid(xi_z + hh_z)
        n = np.tanh(xi_n + r * hh_n)
        return (1.0 - z) * n + z * h

    return step


def nnx_params():
    return {
        "dense_i": {"kernel": draw(IN, 3 * H), "bias": draw(3 * H)},
        "dense_h": {"kernel": draw(H, 3 * H)},
    }


def leaves(tree):
    """The arrays of a list or of dictionaries, with their names."""
    if isinstance(tree, np.ndarray):
        return {"": tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    nested = {key: leaves(value) for key, value in items if isinstance(value, dict | np.ndarray)}
    return {f"{key}/{k}": v for key, inner in nested.items() for k, v in inner.items()}


def assert_same(actual, expected):
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert actual[name].dtype == expected[name].dtype, name
        assert_array_equal(actual[name], expected[name], err_msg=name)


@RESET_AFTER
@DIRECTIONS
@BIAS
def test_keras(reset_after, D, bias):
    weights = keras_weights(D, bias, reset_after)
    layer = convert.from_keras(weights, reset_after=reset_after)
    assert layer.variant == ("torch" if reset_after else "textbook")
    assert (layer.bias, layer.bidirectional, layer.num_layers) == (bias, D == 2, 1)
    assert_computes(layer, keras_steps(weights, D, reset_after))
    assert_same(convert.to_keras(layer), weights)

    layer = drawn_layer(bias=bias, bidirectional=D == 2, variant=layer.variant)
    assert_computes(layer, keras_steps(convert.to_keras(layer), D, reset_after))


@pytest.mark.parametrize("linear_before_reset", [0, 1])
@DIRECTIONS
@BIAS
def test_onnx(linear_before_reset, D, bias):
    inputs = onnx_inputs(D, bias, linear_before_reset)
    layer = convert.from_onnx(**inputs)
    assert layer.variant == ("torch" if linear_before_reset else "textbook")
    assert (layer.bias, layer.bidirectional, layer.num_layers) == (bias, D == 2, 1)
    assert_computes(layer, onnx_steps(inputs))
    if bias and not linear_before_reset:  # whose two biases are one
        summed = inputs["B"][:, : 3 * H] + inputs["B"][:, 3 * H :]
        inputs["B"] = np.concatenate((summed, np.zeros_like(summed)), 1)
    assert_same(convert.to_onnx(layer), inputs)

    layer = drawn_layer(bias=bias, bidirectional=D == 2, variant=layer.variant)
    inputs = convert.to_onnx(layer)
    assert inputs["linear_before_reset"] == linear_before_reset
    assert (inputs["B"] is None) == (not bias)
    assert_computes(layer, onnx_steps(inputs))


def test_onnx_is_linear_after_reset_by_default():
    inputs = onnx_inputs(1, True, 0)
    assert convert.from_onnx(inputs["W"], inputs["R"], inputs["B"]).variant == "textbook"


def test_haiku():
    params = haiku_params()
    layer = convert.from_haiku(params)
    assert (layer.variant, layer.bias, layer.bidirectional) == ("textbook", True, False)
    assert_computes(layer, [haiku_step(params)])
    assert_same(convert.to_haiku(layer), params)
    for bias in (True, False):
        layer = drawn_layer(bias=bias, variant="textbook")
        assert_computes(layer, [haiku_step(convert.to_haiku(layer))])


def test_linen():
    params = linen_params()
    layer = convert.from_linen(params)
    assert (layer.variant, layer.bias, layer.bidirectional) == ("torch", True, False)
    assert_computes(layer, [linen_step(params)])
    assert_same(convert.to_linen(layer), params)
    for bias in (True, False):
        layer = drawn_layer(bias=bias)
        assert_computes(layer, [linen_step(convert.to_linen(layer))])


def test_nnx():
    params = nnx_params()
    layer = convert.from_nnx(params)
    assert (layer.variant, layer.bias, layer.bidirectional) == ("torch", True, False)
    assert_computes(layer, [nnx_step(params)])
    assert_same(convert.to_nnx(layer), params)
    for bias in (True, False):
        layer = drawn_layer(bias=bias)
        if bias:
            layer.bias_hh_l0.data[2 * H :] = 0
        assert_computes(layer, [nnx_step(convert.to_nnx(layer))])


@pytest.mark.parametrize("variant", ops.VARIANTS)
@BIAS
@DIRECTIONS
def test_a_layer_comes_back_as_it_was(variant, bias, D):
    layer = drawn_layer(variant=variant, bias=bias, bidirectional=D == 2)
    there_and_back = [
        convert.from_keras(convert.to_keras(layer), reset_after=variant == "torch"),
        convert.from_onnx(**convert.to_onnx(layer)),
        *convert.unstack(layer),
    ]
    if variant == "textbook" and bias and D == 1:
        there_and_back.append(convert.from_haiku(convert.to_haiku(layer)))
    for other in there_and_back:
        assert repr(other) == repr(layer)
        for (name, ours), (also, theirs) in zip(
            layer.named_parameters(), other.named_parameters(), strict=True
        ):
            assert name == also
            assert_array_equal(theirs.detach(), ours.detach(), err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_dtypes_are_kept(dtype):
    expected = getattr(torch, dtype.__name__)
    for layer in (
        convert.from_keras([w.astype(dtype) for w in keras_weights(2, True, True)]),
        convert.from_linen({k: astype(v, dtype) for k, v in linen_params().items()}),
    ):
        assert {p.dtype for p in layer.parameters()} == {expected}
        assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
        assert {w.dtype for w in convert.to_keras(layer)} == {np.dtype(dtype)}


def astype(params, dtype):
    return {name: array.astype(dtype) for name, array in params.items()}


def example(name):
    """Weights in a format, with biases and in one direction."""
    if name == "keras":
        return keras_weights(1, True, True)
    if name == "onnx":
        return onnx_inputs(1, True, 1)
    return {"haiku": haiku_params, "linen": linen_params, "nnx": nnx_params}[name]()


def read(name, weights, **settings):
    if name == "onnx":
        return convert.from_onnx(**weights, **settings)
    return getattr(convert, f"from_{name}")(weights, **settings)


@FORMAT
def test_batch_first(name):
    weights, x = example(name), torch.randn(T, B, IN, dtype=F64)
    y, _ = read(name, weights)(x)
    layer = read(name, weights, batch_first=True)
    assert layer.batch_first
    assert torch.equal(layer(x.transpose(0, 1))[0], y.transpose(0, 1))


@FORMAT
def test_nothing_shares_memory_and_no_random_number_is_drawn(name):
    weights = example(name)
    before = torch.get_rng_state()
    layer = read(name, weights)
    assert torch.equal(torch.get_rng_state(), before)
    for array in leaves(weights).values():
        array[...] = np.nan
    assert all(p.isfinite().all() for p in layer.parameters())

    for array in leaves(getattr(convert, f"to_{name}")(layer)).values():
        assert array.flags.c_contiguous
        array[...] = np.nan
    assert all(p.isfinite().all() for p in layer.parameters())


def test_read_only_arrays_and_tensors_are_taken_too(recwarn):
    params = haiku_params()
    expected = convert.from_haiku(params).state_dict()
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in params.items()}
    for array in params.values():
        array.flags.writeable = False
    for layer in (convert.from_haiku(params), convert.from_haiku(tensors)):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, expected[name])
    with torch.no_grad():
        tensors["b"].zero_()
    assert layer.bias_ih_l0.all()
    assert not recwarn.list


class OnlyArray:
    """What other libraries' arrays and variables have in common."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None):
        return self.array


class KerasVariable(OnlyArray):
    """Has items but no length, and names its dtype."""

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype.name)

    def __getitem__(self, index):
        return self.array[index]


class JaxArray(OnlyArray):
    """Whose rows are of its own kind."""

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return JaxArray(self.array[index])


class FlaxVariable:
    """Which asks its value for everything."""

    def __init__(self, array):
        self.value = JaxArray(array)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "value"), name)


ARRAYS = {
    "an array alone": OnlyArray,
    "Keras": KerasVariable,
    "JAX": JaxArray,
    "Flax": FlaxVariable,
    "list": list,  # of arrays, or of NumPy's numbers, which have a dtype
    "tuple": lambda array: tuple(OnlyArray(np.asarray(row)) for row in array),
    "another byte order": lambda array: array.astype(">f8"),
    "backwards in memory": lambda array: array[::-1].copy()[::-1],
}


def changed(tree, function):
    """The list or the dictionaries with each array as `function` of it."""
    if isinstance(tree, list):
        return [changed(each, function) for each in tree]
    if isinstance(tree, dict):
        return {name: changed(each, function) for name, each in tree.items()}
    return function(tree) if isinstance(tree, np.ndarray) else tree


@FORMAT
@pytest.mark.parametrize("kind", ARRAYS)
def test_what_other_libraries_hold_arrays_in(recwarn, name, kind):
    weights = example(name)
    layer = read(name, changed(weights, ARRAYS[kind]))
    expected = read(name, weights).state_dict()
    for parameter, value in layer.state_dict().items():
        assert torch.equal(value, expected[parameter])
    assert not recwarn.list


@FORMAT
def test_numbers_of_python(name):
    """Which are torch's, of the default dtype."""
    weights = example(name)
    layer = read(name, changed(weights, np.ndarray.tolist))
    for parameter, value in read(name, weights).state_dict().items():
        assert torch.equal(layer.state_dict()[parameter], value.float())


@FORMAT
def test_bfloat16_of_other_libraries(name):
    from ml_dtypes import bfloat16  # here, as the tests of ONNX have theirs, which needs it

    weights = example(name)
    for order in ("C", "F"):
        layer = read(name, changed(weights, lambda a, o=order: OnlyArray(a.astype(bfloat16, o))))
        for parameter, value in read(name, weights).state_dict().items():
            assert torch.equal(layer.state_dict()[parameter], value.bfloat16())


def test_what_is_no_array():
    params = haiku_params()
    for wrong, message in (
        (None, r"b must be an array of numbers, got NoneType: Could not infer dtype"),
        ("bias", r"b must be an array of numbers, got str: "),
        ([[1.0], [2.0, 3.0]], r"b must be an array of numbers, got list: expected sequence of len"),
        (np.array(["a"]), r"b must be an array of numbers, got ndarray: can't convert"),
        (OnlyArray(np.array([None])), r"b must be an array of numbers, got OnlyArray: can't conv"),
    ):
        with pytest.raises(TypeError, match=message):
            convert.from_haiku(params | {"b": wrong})


@pytest.mark.parametrize("variant", ops.VARIANTS)
@DIRECTIONS
def test_a_stack(variant, D):
    layer = TriGRU(
        IN, H, num_layers=3, bidirectional=D == 2, variant=variant, dropout=0.5, dtype=F64
    ).eval()
    parts = convert.unstack(layer)
    assert [part.input_size for part in parts] == [IN, D * H, D * H]
    assert [part.num_layers for part in parts] == [1, 1, 1]
    assert {part.dropout for part in parts} == {0.0}

    x, h0 = torch.randn(T, B, IN, dtype=F64), torch.randn(3 * D, B, H, dtype=F64)
    expected_y, expected_h_n = layer(x, h0)
    y, h_n = x, []
    for part, h in zip(parts, h0.split(D), strict=True):
        y, h = part(y, h)
        h_n.append(h)
    assert torch.equal(y, expected_y)
    assert torch.equal(torch.cat(h_n), expected_h_n)

    again = convert.stack(parts)
    assert repr(again) == repr(layer).replace(", dropout=0.5", "")
    assert again.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(again(x, h0)[0], expected_y)
    two = convert.stack([parts[0], convert.stack(parts[1:])])
    assert torch.equal(two(x, h0)[0], expected_y)

    for p in layer.parameters():
        p.data.zero_()
    assert all(p.any() for part in parts for p in part.parameters())
    for part in parts:
        for p in part.parameters():
            p.data.zero_()
    assert all(p.any() for p in again.parameters())


OWN = {"heads": 2, "learn_reset": True, "clip": 0.5}  # what no other library has


@pytest.mark.parametrize("variant", ops.VARIANTS)
@DIRECTIONS
def test_a_stack_of_what_no_other_library_has(variant, D):
    layer = TriGRU(IN, 4, num_layers=3, bidirectional=D == 2, variant=variant, dtype=F64, **OWN)
    for p in layer.parameters():
        p.data.normal_()
    parts = convert.unstack(layer)
    for k, part in enumerate(parts):
        assert {name: getattr(part, name) for name in OWN} == OWN
        assert torch.equal(part.reset_state, layer.reset_state[k * D : (k + 1) * D])
    x, resets = torch.randn(T, B, IN, dtype=F64), torch.rand(T, B) < 0.5
    y = x
    for part in parts:
        y, _ = part(y, resets=resets)
    assert torch.equal(y, layer(x, resets=resets)[0])
    for again in (convert.stack(parts), convert.stack([parts[0], convert.stack(parts[1:])])):
        assert repr(again) == repr(layer)
        for name, p in layer.named_parameters():
            assert torch.equal(again.get_parameter(name), p), name


# Heads


HEADS_OF_STACKS = pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False, "batch_first": True}, {"num_layers": 2, "bidirectional": True}],
    ids=str,
)


def drawn_heads(heads, **settings):
    layer = TriGRU(IN, 8, heads=heads, dtype=F64, **settings)
    for p in layer.parameters():
        p.data.normal_()
    return layer


def assert_same_function(ours, theirs):
    """With resets and without; and each has its own weights."""
    x = torch.randn(T, B, IN, dtype=F64)
    resets = torch.rand(T, B, 2) < 0.4 if ours.bidirectional else torch.rand(T, B) < 0.4
    if ours.batch_first:
        x, resets = x.transpose(0, 1), resets.transpose(0, 1)
    with torch.no_grad():
        for given in ({}, {"resets": resets}):
            for actual, exact in zip(ours(x, **given), theirs(x, **given), strict=True):
                assert_allclose(actual, exact, rtol=1e-12, atol=1e-12)
    pointers = {p.data_ptr() for p in theirs.parameters()}
    assert not pointers & {p.data_ptr() for p in ours.parameters()}


@pytest.mark.parametrize("variant", ops.VARIANTS)
@pytest.mark.parametrize("own", [{}, {"learn_reset": True, "clip": 0.5}], ids=["", "and all else"])
@HEADS_OF_STACKS
def test_heads_become_dense_and_come_back(variant, own, settings):
    layer = drawn_heads(4, **settings, **own, variant=variant).eval()
    before = torch.get_rng_state()
    dense = convert.to_dense(layer)
    again = convert.from_dense(dense, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(dense) == repr(layer).replace(", heads=4", "") and not dense.training
    assert_same_function(dense, layer)
    for name, p in dense.named_parameters():
        assert p.is_leaf and p.requires_grad and p.dtype == F64
        if name.startswith("weight_hh"):
            assert p.shape == (24, 8)
            assert p.count_nonzero() == 24 * 2  # each row has those of its head's units
    assert repr(again) == repr(layer)
    for name, p in layer.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name
    assert_same_function(convert.from_dense(dense, 2), layer)  # of two blocks each
    assert_same_function(convert.from_dense(layer, 2), layer)
    assert_same_function(convert.from_dense(layer, 1), layer)
    assert_same_function(convert.to_dense(dense), dense)


@HEADS_OF_STACKS
def test_heads_by_way_of_nn_gru(settings):
    layer = drawn_heads(4, **settings)
    gru = convert.to_dense(layer).to_torch()
    x = torch.randn(T, B, IN, dtype=F64)
    with torch.no_grad():
        assert_allclose(gru(x)[0], layer(x)[0], rtol=1e-12, atol=1e-12)
    again = convert.from_dense(gru, 4)
    assert type(again) is TriGRU and repr(again) == repr(layer)
    for name, p in layer.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name


def test_dropout_between_layers_with_heads_is_kept():
    layer = drawn_heads(2, num_layers=2, dropout=0.25)
    assert convert.to_dense(layer).dropout == 0.25
    assert convert.from_dense(convert.to_dense(layer), 2).dropout == 0.25


@pytest.mark.parametrize("number", [1e-30, float("nan"), -2.5], ids=str)
def test_what_is_outside_of_the_blocks(number):
    dense = convert.to_dense(drawn_heads(4, num_layers=2, bidirectional=True))
    dense.weight_hh_l1_reverse.data[13, 3] = number  # of z of unit 5: its head has 4 and 5
    dense.weight_hh_l1_reverse.data[23, 0] = 1.0
    text = rf"weight_hh_l1_reverse must be 0 .* 4 heads, got 2 .* first {number:.3g} in row 13, col"
    with pytest.raises(ValueError, match=text):
        convert.from_dense(dense, 4)
    dense.weight_hh_l1_reverse.data[13, 3] = 0
    with pytest.raises(ValueError, match=r"weight_hh_l1_reverse must .* got 1 .* 1 in row 23, col"):
        convert.from_dense(dense, 2)
    assert convert.from_dense(dense, 1).heads == 1


def test_heads_that_cannot_be():
    for heads, error, text in (
        (3, ValueError, "heads must divide hidden_size 8, got 3"),
        (0, ValueError, "heads must divide hidden_size 8, got 0"),
        (2.0, TypeError, "heads must be an int, got float"),
    ):
        for layer in (nn.GRU(IN, 8), TriGRU(IN, 8)):
            with pytest.raises(error, match=text):
                convert.from_dense(layer, heads)
    for to in (convert.to_dense, lambda layer: convert.from_dense(layer, 2)):
        with pytest.raises(TypeError, match="expected a TriGRU, got Linear; see TriGRU"):
            to(nn.Linear(IN, H))


@FORMAT
def test_what_no_format_has(name):
    to = getattr(convert, f"to_{name}")
    variant = "textbook" if name == "haiku" else "torch"
    for settings, text in (
        ({"heads": 4}, r"has no heads, the layer has 4: see trigru.convert.to_dense"),
        ({"clip": 0.5}, r"has no clip, the layer has 0.5"),
        ({"learn_reset": True}, r"has no reset_state, which the layer has learned"),
    ):
        with pytest.raises(ValueError, match=text):
            to(TriGRU(IN, 8, variant=variant, **settings))
    layer = drawn_heads(4, variant=variant)
    if name == "nnx":
        layer.bias_hh_l0.data[16:] = 0
    assert_same_function(read(name, to(convert.to_dense(layer))), layer)


def test_what_cannot_be_one_stack():
    one = TriGRU(IN, H)
    with pytest.raises(ValueError, match=r"layer 1 of the stack must have {'input_size': 3}, got"):
        convert.stack([one, one])
    for other, message in (
        (TriGRU(IN, H), r"must have {'input_size': 3}, got {'input_size': 4}"),
        (TriGRU(H, H + 1), r"must have {'hidden_size': 3}, got {'hidden_size': 4}"),
        (TriGRU(H, H, variant="textbook"), r"must have {'variant': 'torch'}, got {'variant': 't"),
        (TriGRU(H, H, heads=3), r"must have {'heads': 1}, got {'heads': 3}"),
        (TriGRU(H, H, clip=2.0), r"must have {'clip': None}, got {'clip': 2.0}"),
        (TriGRU(H, H, learn_reset=True), r"must have {'learn_reset': False}, got {'learn_reset'"),
        (TriGRU(H, H, bias=False), r"must have {'bias': True}, got {'bias': False}"),
        (TriGRU(H, H, bidirectional=True), r"must have {'bidirectional': False}, got"),
        (TriGRU(H, H, batch_first=True), r"must have {'batch_first': False}, got"),
        (TriGRU(H, H, dtype=F64), r"must have {'dtype': torch.float32}, got"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.stack([one, other])
    with pytest.raises(ValueError, match="at least one TriGRU, got none"):
        convert.stack([])
    with pytest.raises(TypeError, match="expected a TriGRU, got GRU; see TriGRU"):
        convert.stack([one, nn.GRU(H, H)])


def test_what_a_format_cannot_compute():
    torch_form, textbook = drawn_layer(), drawn_layer(variant="textbook")
    both = {v: drawn_layer(variant=v, bidirectional=True) for v in ops.VARIANTS}
    deep = {v: drawn_layer(variant=v, num_layers=2) for v in ops.VARIANTS}
    for to, variant, other in (
        (convert.to_haiku, "textbook", torch_form),
        (convert.to_linen, "torch", textbook),
        (convert.to_nnx, "torch", textbook),
    ):
        with pytest.raises(ValueError, match=f"computes variant '{variant}' only, the layer is of"):
            to(other)
        with pytest.raises(ValueError, match="has one direction, the layer has two"):
            to(both[variant])
        with pytest.raises(ValueError, match=r"is one layer, got 2: convert each of unstack"):
            to(deep[variant])
    for to in (convert.to_keras, convert.to_onnx):
        with pytest.raises(ValueError, match=r"is one layer, got 2: convert each of unstack"):
            to(deep["torch"])
    with pytest.raises(ValueError, match=r"no bias inside r ⊙ .* must be 0, got values up to 2.5;"):
        torch_form.bias_hh_l0.data[2 * H :] = torch.tensor([0, -2.5, 1])
        convert.to_nnx(torch_form)
    for to in (convert.to_keras, convert.to_onnx, convert.to_haiku, convert.unstack):
        with pytest.raises(TypeError, match="expected a TriGRU, got GRU; see TriGRU"):
            to(nn.GRU(IN, H))
    with pytest.raises(TypeError, match=r"NumPy has no bfloat16: convert layer.float\(\) instead"):
        convert.to_keras(TriGRU(IN, H, dtype=torch.bfloat16))


def test_wrong_keras_weights():
    kernel, recurrent, bias = keras_weights(1, True, True)
    for weights, reset_after, message in (
        ([kernel], True, "2, 3, 4 or 6 arrays; got 1"),
        ([kernel, recurrent, bias, kernel, recurrent], True, "2, 3, 4 or 6 arrays; got 5"),
        ([kernel, recurrent, bias], False, r"bias .* must have shape \(9,\), got \(2, 9\)"),
        ([kernel, recurrent, bias[0]], True, r"bias .* must have shape \(2, 9\), got \(9,\)"),
        ([kernel, recurrent.T], True, r"recurrent_kernel must have shape \(H, 3H\), got \(9, 3\)"),
        ([kernel.T, recurrent], True, r"kernel must have shape \(I, 9\), got \(9, 4\)"),
        ([recurrent[0], recurrent], True, r"kernel must have shape \(I, 9\), got \(9,\)"),
        ([kernel, kernel[None]], True, r"recurrent_kernel must have shape \(H, 3H\), got"),
        (
            [kernel, recurrent, kernel[:3], recurrent],
            True,
            r"backward kernel must have shape \(4, 9\), got \(3, 9\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_keras(weights, reset_after=reset_after)


def test_wrong_onnx_inputs():
    W, R, bias, _ = onnx_inputs(2, True, 1).values()
    for inputs, message in (
        ((W, R[0], bias), r"R must have shape \(1, 3H, H\) or \(2, 3H, H\), got \(9, 3\)"),
        ((W, R.swapaxes(1, 2), bias), r"R must have shape .*, got \(2, 3, 9\)"),
        ((W[:1], R, bias), r"W must have shape \(2, 9, I\), got \(1, 9, 4\)"),
        ((W.swapaxes(1, 2), R, bias), r"W must have shape \(2, 9, I\), got \(2, 4, 9\)"),
        ((W, R, bias[:, : 3 * H]), r"B must have shape \(2, 18\), got \(2, 9\)"),
        ((W, np.concatenate((R, R)), bias), r"\(1, 3H, H\) or \(2, 3H, H\), got \(4, 9, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_onnx(*inputs, linear_before_reset=1)


def test_wrong_parameters_of_jax_libraries():
    haiku, linen, nnx = haiku_params(), linen_params(), nnx_params()
    for function, params, message in (
        (convert.from_haiku, {"gru": haiku}, r"expected the parameters \['b', 'w_h', 'w_i'\], got"),
        (convert.from_haiku, haiku | {"w_h": haiku["w_h"].T}, r"w_h must have shape \(H, 3H\)"),
        (convert.from_haiku, haiku | {"w_h": haiku["b"]}, r"w_h must have shape \(H, 3H\)"),
        (convert.from_haiku, haiku | {"w_i": haiku["w_i"].T}, r"w_i must have shape \(I, 9\)"),
        (convert.from_haiku, haiku | {"b": haiku["b"][:-1]}, r"b must have shape \(9,\), got \(8,"),
        (convert.from_linen, {"params": linen}, r"got \['params/hn/bias', 'params/hn/kernel', "),
        (convert.from_linen, linen | {"hr": linen["hn"]}, r"expected .* got .*'hr/bias'"),
        (convert.from_linen, linen | {"ir": linen["hn"]}, r"ir/kernel must have shape \(4, 3\)"),
        (convert.from_linen, linen | {"hr": nnx["dense_h"]}, r"hr/kernel must have shape \(3, 3\)"),
        (convert.from_nnx, linen, r"expected the parameters \['dense_h/kernel', 'dense_i/bias', "),
        (convert.from_nnx, nnx | {"dense_h": linen["hr"]}, r"dense_h/kernel must .* \(H, 3H\)"),
        (convert.from_nnx, nnx | {"dense_i": linen["ir"]}, r"dense_i/kernel must .* \(I, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            function(params)


def test_wrong_dtypes():
    params = haiku_params()
    with pytest.raises(TypeError, match=r"one floating dtype, got .*'b': torch.float32"):
        convert.from_haiku(params | {"b": params["b"].astype(np.float32)})
    with pytest.raises(TypeError, match=r"one floating dtype, got .*torch.int64"):
        convert.from_haiku({name: array.astype(np.int64) for name, array in params.items()})
