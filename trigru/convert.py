"""A GRU's weights from and to other libraries, as plain arrays; none of them is imported.

Each `from_…` copies a library's arrays into a new TriGRU on the CPU, in their dtype. It takes what
NumPy takes: the library's own arrays and variables, too, and lists. Each `to_…` returns new NumPy
arrays. Order of the gates, meaning of z and biases differ:

==========================  =======  =====================  ===========================  ========
format                      order    state                  biases                       variant
==========================  =======  =====================  ===========================  ========
Keras, reset_after=True     z, r, h  h' = z h + (1 − z) n   (2, 3H): input's, state's    torch
Keras, reset_after=False    z, r, h  h' = z h + (1 − z) n   (3H,)                        textbook
ONNX, linear_before_reset   z, r, h  h' = (1 − z) n + z h   (·, 6H): Wb, Rb              torch
ONNX, without               z, r, h  h' = (1 − z) n + z h   (·, 6H): Wb, Rb, summed      textbook
Haiku, hk.GRU               z, r, a  h' = (1 − z) h + z n   (3H,)                        textbook
Flax linen, nn.GRUCell      by name  h' = (1 − z) n + z h   of ir, iz, in and hn         torch
Flax nnx, nnx.GRUCell       r, z, n  h' = (1 − z) n + z h   dense_i (3H,)                torch
==========================  =======  =====================  ===========================  ========

Where z keeps what the textbook form's z takes, its rows change their sign, since 1 − σ(a) = σ(−a).
Where two biases are only ever summed, a format that has one bias gets the sum.

No format has heads, a clip or a learned reset state: each `to_…` raises ValueError on them. But a
layer with heads can first become one without, `to_dense(layer)`, which computes the same;
`from_dense` is the inverse.

The formats hold one layer. Of a stack convert each, `[to_keras(one) for one in unstack(layer)]`,
and back, `stack([from_keras(w) for w in weights])`. The activations are taken to be tanh and the
sigmoid, every library's default (before version 2.3 Keras' was hard_sigmoid, another function).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .layer import TriGRU, dense_blocks
from .onnx import gru_inputs

Weights = list[Tensor]  # w_ih (D, 3H, I), w_hh (D, 3H, H), and with biases b_ih, b_hh (D, 3H)


def from_keras(
    weights: Sequence[Any], *, reset_after: bool = True, batch_first: bool = False
) -> TriGRU:
    """A TriGRU that computes what a Keras GRU or Bidirectional(GRU) with these weights computes.

    Keras' `GRUCell.call` (keras/src/layers/rnn/gru.py), for h the state before::

        z = σ(x K_z + h R_z + b)    hh = tanh(x K_h + b_h + r ⊙ (h R_h + b'_h))   reset_after=True
        r = σ(x K_r + h R_r + b)    hh = tanh(x K_h + b_h + (r ⊙ h) R_h)          reset_after=False
        h' = z ⊙ h + (1 − z) ⊙ hh

    Args:
        weights: what `get_weights()` returns, or the layer's `weights`: kernel (I, 3H),
            recurrent_kernel (H, 3H) and, unless use_bias=False, bias (2, 3H), or (3H,) without
            reset_after. A Bidirectional's has the forward layer's and then the backward layer's.
        reset_after: the Keras layer's, True by default. True is variant "torch", False "textbook".
        batch_first: the TriGRU's. Keras' own input is (B, T, I), as with batch_first=True.

    Raises ValueError on a wrong number of arrays or a wrong shape, TypeError on a wrong dtype."""
    if len(weights) not in (2, 3, 4, 6):
        raise ValueError(
            "expected kernel, recurrent_kernel and, with use_bias, bias, of one direction or of "
            f"two, so 2, 3, 4 or 6 arrays; got {len(weights)}"
        )
    D = 1 if len(weights) < 4 else 2
    kinds = ["kernel", "recurrent_kernel", f"bias with {reset_after=}"][: len(weights) // D]
    names = kinds + [f"backward {kind}" for kind in kinds] * (D - 1)
    tensors = _tensors(dict(zip(names, weights, strict=True)))
    H = _hidden_size("recurrent_kernel", tensors[1])
    _expect("kernel", tensors[0], "I", 3 * H)
    shapes = [tensors[0].shape, (H, 3 * H), (2, 3 * H) if reset_after else (3 * H,)]
    for name, tensor, shape in zip(names, tensors, shapes[: len(kinds)] * D, strict=True):
        _expect(name, tensor, *shape)

    directions = tensors[: len(kinds)], tensors[len(kinds) :]
    kernel, recurrent_kernel, *bias = (
        torch.stack(kind) for kind in zip(*directions[:D], strict=True)
    )
    converted = [kernel.mT, recurrent_kernel.mT]  # (D, 3H, …)
    if bias:
        converted += bias[0].unbind(1) if reset_after else bias  # (D, 3H)
    converted = [_r_with_z(t) for t in converted]
    if not reset_after:
        converted = [_negative_z(t) for t in converted]
    return _new("torch" if reset_after else "textbook", converted, batch_first)


def to_keras(layer: TriGRU) -> list[Any]:
    """What `set_weights` of a Keras GRU(H, reset_after=layer.variant == "torch") takes, or of a
    Bidirectional of it, with use_bias as the layer's bias. See `from_keras`.

    Raises ValueError on more than one layer."""
    w = _weights(layer, "Keras' GRU", directions=2)
    if layer.variant == "textbook":
        w = [_negative_z(t) for t in w]
    w_ih, w_hh, *biases = (_r_with_z(t) for t in w)
    kinds = [w_ih.mT, w_hh.mT]
    if biases:
        kinds.append(torch.stack(biases, 1) if layer.variant == "torch" else biases[0])
    return [_array(kind[d]) for d in range(len(w_ih)) for kind in kinds]


def from_onnx(
    W: Any, R: Any, B: Any = None, *, linear_before_reset: int = 0, batch_first: bool = False
) -> TriGRU:
    """A TriGRU that computes what an ONNX GRU node with these inputs computes.

    The operator's own equations (onnx.ai/onnx/operators/onnx__GRU.html)::

        zt = σ(Xt Wzᵀ + Ht-1 Rzᵀ + Wbz + Rbz)        rt = σ(Xt Wrᵀ + Ht-1 Rrᵀ + Wbr + Rbr)
        ht = tanh(Xt Whᵀ + (rt ⊙ Ht-1) Rhᵀ + Rbh + Wbh)      linear_before_reset = 0
        ht = tanh(Xt Whᵀ + rt ⊙ (Ht-1 Rhᵀ + Rbh) + Wbh)      linear_before_reset ≠ 0
        Ht = (1 − zt) ⊙ ht + zt ⊙ Ht-1

    Args:
        W: (D, 3H, I), D = 2 for a bidirectional node, else 1.
        R: (D, 3H, H).
        B: (D, 6H), or None for no biases.
        linear_before_reset: the node's attribute, 0 by default. 0 is variant "textbook", another
            number "torch".
        batch_first: the TriGRU's; the node's layout=1.

    For a node of direction "reverse" give the TriGRU x.flip(0) and take y.flip(0).

    Raises ValueError on a wrong shape, TypeError on a wrong dtype."""
    named = {"W": W, "R": R} if B is None else {"W": W, "R": R, "B": B}
    W, R, *biases = _tensors(named)
    if R.dim() != 3 or len(R) not in (1, 2) or R.shape[1] != 3 * R.shape[2]:
        raise ValueError(f"R must have shape (1, 3H, H) or (2, 3H, H), got {tuple(R.shape)}")
    D, _, H = R.shape
    _expect("W", W, D, 3 * H, "I")
    if biases:
        _expect("B", biases[0], D, 6 * H)
        biases = list(biases[0].split(3 * H, 1))  # Wb, Rb

    converted = [_r_with_z(t) for t in (W, R, *biases)]
    if linear_before_reset:
        return _new("torch", converted, batch_first)
    if biases:
        converted[2:] = [converted[2] + converted[3]]
    return _new("textbook", [_negative_z(t) for t in converted], batch_first)


def to_onnx(layer: TriGRU) -> dict[str, Any]:
    """W (D, 3H, I), R (D, 3H, H), B (D, 6H), or None without biases, and linear_before_reset of the
    ONNX GRU node that computes what the layer computes: `from_onnx(**to_onnx(layer))` is the layer.

    Raises ValueError on more than one layer."""
    w = _weights(layer, "an ONNX GRU node", directions=2)
    W, R, B = gru_inputs(w, textbook=layer.variant == "textbook")
    return {
        "W": _array(W),
        "R": _array(R),
        "B": None if B is None else _array(B),
        "linear_before_reset": int(layer.variant == "torch"),
    }


def from_haiku(params: Mapping[str, Any], *, batch_first: bool = False) -> TriGRU:
    """A TriGRU, variant "textbook", that computes what dm-haiku's hk.GRU computes.

    Its docstring (haiku/_src/recurrent.py)::

        z_t = σ(W_iz x_t + W_hz h_{t−1} + b_z)    a_t = tanh(W_ia x_t + W_ha (r_t ⊙ h_{t−1}) + b_a)
        r_t = σ(W_ir x_t + W_hr h_{t−1} + b_r)    h_t = (1 − z_t) ⊙ h_{t−1} + z_t ⊙ a_t

    Args:
        params: the module's own, as `params["gru"]`: w_i (I, 3H), w_h (H, 3H) and b (3H,).
        batch_first: the TriGRU's.

    Raises ValueError on other names or a wrong shape, TypeError on a wrong dtype."""
    w_i, w_h, b = _named(params, ("w_i", "w_h", "b"))
    H = _hidden_size("w_h", w_h)
    _expect("w_i", w_i, "I", 3 * H)
    _expect("b", b, 3 * H)
    converted = [_r_with_z(t.unsqueeze(0)) for t in (w_i.T, w_h.T, b)]
    return _new("textbook", converted, batch_first)


def to_haiku(layer: TriGRU) -> dict[str, Any]:
    """The parameters of a dm-haiku hk.GRU that computes what the layer computes, see `from_haiku`.

    Raises ValueError on variant "torch", more than one layer, or two directions."""
    w_ih, w_hh, b = _weights(layer, "Haiku's hk.GRU", variant="textbook", bias=True)
    w_i, w_h, b = (_r_with_z(t)[0] for t in (w_ih, w_hh, b))
    return {"w_i": _array(w_i.T), "w_h": _array(w_h.T), "b": _array(b)}


def from_linen(params: Mapping[str, Any], *, batch_first: bool = False) -> TriGRU:
    """A TriGRU that computes what Flax linen's nn.GRUCell computes, step by step.

    Its docstring (flax/linen/recurrent.py)::

        r = σ(W_ir x + b_ir + W_hr h)       n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
        z = σ(W_iz x + b_iz + W_hz h)       h' = (1 − z) * n + z * h

    Args:
        params: the cell's own, as `variables["params"]`: of ir, iz and in a kernel (I, H) and a
            bias (H,), of hr, hz and hn a kernel (H, H), of hn a bias (H,).
        batch_first: the TriGRU's.

    Raises ValueError on other names or a wrong shape, TypeError on a wrong dtype."""
    inputs = [f"{gate}/{kind}" for kind in ("kernel", "bias") for gate in ("ir", "iz", "in")]
    names = [*inputs, "hr/kernel", "hz/kernel", "hn/kernel", "hn/bias"]
    tensors = _named(params, names)
    _expect("hn/kernel", tensors[8], "H", "H")
    H = len(tensors[8])
    _expect("in/kernel", tensors[2], "I", H)
    shapes = [(len(tensors[2]), H)] * 3 + [(H,)] * 3 + [(H, H)] * 3 + [(H,)]
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        _expect(name, tensor, *shape)
    b_hn = tensors[9]
    b_hh = torch.cat((torch.zeros_like(b_hn), torch.zeros_like(b_hn), b_hn))
    w_ih, b_ih, w_hh = (
        torch.cat(tensors[:3], 1),
        torch.cat(tensors[3:6]),
        torch.cat(tensors[6:9], 1),
    )
    return _new("torch", [t.unsqueeze(0) for t in (w_ih.T, w_hh.T, b_ih, b_hh)], batch_first)


def to_linen(layer: TriGRU) -> dict[str, dict[str, Any]]:
    """The parameters of a Flax linen nn.GRUCell that computes what the layer computes, see
    `from_linen`. Its biases of r and z are the sums of the layer's two.

    Raises ValueError on variant "textbook", more than one layer, or two directions."""
    w = _weights(layer, "Flax' nn.GRUCell", variant="torch", bias=True)
    w_ih, w_hh, b_ih, b_hh = (t[0].chunk(3) for t in w)
    return {
        "ir": {"kernel": _array(w_ih[0].T), "bias": _array(b_ih[0] + b_hh[0])},
        "iz": {"kernel": _array(w_ih[1].T), "bias": _array(b_ih[1] + b_hh[1])},
        "in": {"kernel": _array(w_ih[2].T), "bias": _array(b_ih[2])},
        "hr": {"kernel": _array(w_hh[0].T)},
        "hz": {"kernel": _array(w_hh[1].T)},
        "hn": {"kernel": _array(w_hh[2].T), "bias": _array(b_hh[2])},
    }


def from_nnx(params: Mapping[str, Any], *, batch_first: bool = False) -> TriGRU:
    """A TriGRU that computes what Flax nnx' GRUCell computes, step by step.

    Its code (flax/nnx/nn/recurrent.py), whose dense_h has no bias though its docstring has b_hn::

        r = σ(W_ir x + b_ir + W_hr h)       n = tanh(W_in x + b_in + r * (W_hn h))
        z = σ(W_iz x + b_iz + W_hz h)       h' = (1 − z) * n + z * h

    Args:
        params: `nnx.state(cell, nnx.Param)`, or `nnx.to_pure_dict` of it: of dense_i a kernel
            (I, 3H) and a bias (3H,), of dense_h a kernel (H, 3H).
        batch_first: the TriGRU's.

    Raises ValueError on other names or a wrong shape, TypeError on a wrong dtype."""
    w_i, b, w_h = _named(params, ("dense_i/kernel", "dense_i/bias", "dense_h/kernel"))
    H = _hidden_size("dense_h/kernel", w_h)
    _expect("dense_i/kernel", w_i, "I", 3 * H)
    _expect("dense_i/bias", b, 3 * H)
    converted = [t.unsqueeze(0) for t in (w_i.T, w_h.T, b, torch.zeros_like(b))]
    return _new("torch", converted, batch_first)


def to_nnx(layer: TriGRU) -> dict[str, dict[str, Any]]:
    """The parameters of a Flax nnx GRUCell that computes what the layer computes, for
    `nnx.replace_by_pure_dict`, see `from_nnx`. Its biases of r and z are the sums of the layer's.

    Raises ValueError on variant "textbook", more than one layer, two directions, or a b_hn that is
    not 0: the cell has none."""
    w = _weights(layer, "Flax' nnx.GRUCell", variant="torch", bias=True)
    w_ih, w_hh, b_ih, b_hh = (t[0] for t in w)
    b_hn = b_hh.chunk(3)[2]
    if b_hn.count_nonzero():
        raise ValueError(
            "Flax' nnx.GRUCell has no bias inside r ⊙ (…), so the last third of bias_hh_l0 must be "
            f"0, got values up to {b_hn.abs().max().item():.3g}; linen's nn.GRUCell has one"
        )
    # The last third of b_hh is 0, so that the sum leaves b_in as it is.
    return {
        "dense_i": {"kernel": _array(w_ih.T), "bias": _array(b_ih + b_hh)},
        "dense_h": {"kernel": _array(w_hh.T)},
    }


def stack(layers: Sequence[TriGRU]) -> TriGRU:
    """One TriGRU of several on top of each other, with copies of their weights and without dropout.

    Raises ValueError if they cannot be the layers of one: an upper one's input_size must be
    directions · H, and all else the same."""
    if not layers:
        raise ValueError("expected at least one TriGRU, got none")
    for k, layer in enumerate(layers):
        _expect_trigru(layer)
        ours, theirs = _settings(layers[0]), _settings(layer)
        if k > 0:
            ours["input_size"] = ours["hidden_size"] * (2 if ours["bidirectional"] else 1)
        expected = {name: ours[name] for name in ours if ours[name] != theirs[name]}
        if expected:
            got = {name: theirs[name] for name in expected}
            raise ValueError(f"layer {k} of the stack must have {expected}, got {got}")
    weights = [direction for layer in layers for direction in layer.all_weights]
    reset_state = torch.cat([layer.reset_state for layer in layers]) if layer.learn_reset else None
    depth = sum(layer.num_layers for layer in layers)
    return _filled(weights, reset_state, num_layers=depth, **_settings(layers[0]))


def unstack(layer: TriGRU) -> list[TriGRU]:
    """A layer's layers, each as a TriGRU of its own with a copy of its weights, the lowest first.
    Dropout between them is left out."""
    _expect_trigru(layer)
    D = 2 if layer.bidirectional else 1
    settings = _settings(layer)
    parts = []
    for i in range(0, len(layer.all_weights), D):
        weights = layer.all_weights[i : i + D]
        reset_state = layer.reset_state[i : i + D] if layer.learn_reset else None
        settings["input_size"] = weights[0][0].shape[1]
        parts.append(_filled(weights, reset_state, **settings))
    return parts


def to_dense(layer: TriGRU) -> TriGRU:
    """A TriGRU of one head, with copies of the layer's weights, that computes what the layer
    computes: what is outside the blocks of its `weight_hh_l*` (3H, H) is 0. All else is the
    layer's, and `.to_torch()` of it an nn.GRU where the rest allows that."""
    _expect_trigru(layer)
    return _with_heads(layer, 1)


def from_dense(layer: TriGRU | nn.GRU, heads: int) -> TriGRU:
    """A TriGRU of so many heads, with copies of the layer's weights, that computes what the layer
    computes. All else is the layer's.

    Raises ValueError if a number outside the blocks of a `weight_hh_l*` is not 0, or if heads do
    not divide H."""
    if isinstance(layer, nn.GRU):
        layer = TriGRU.from_torch(layer)
    _expect_trigru(layer)
    return _with_heads(layer, heads)


def _with_heads(layer: TriGRU, heads: int) -> TriGRU:
    own = {"num_layers": layer.num_layers, "dropout": layer.dropout, "heads": heads}
    other: Any = skip_init(TriGRU, **_settings(layer) | own)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            value = getattr(layer, name)
            if name.startswith("weight_hh"):
                value = dense_blocks(value) if layer.heads > 1 else value
                value = _blocks(name, value, heads) if heads > 1 else value
            parameter.copy_(value)
    return other.train(layer.training)


def _blocks(name: str, w_hh: Tensor, heads: int) -> Tensor:
    """The blocks (heads, 3H / heads, H / heads) of w_hh (3H, H): the inverse of `dense_blocks`."""
    # (3, heads, H / heads, heads, H / heads), of which those of a head with itself
    parts = w_hh.unflatten(1, (heads, -1)).unflatten(0, (3, heads, -1))
    blocks = parts.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2).flatten(1, 2)
    outside = dense_blocks(torch.ones_like(blocks)) == 0
    wrong = ((w_hh != 0) & outside).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"{name} must be 0 outside the blocks of {heads} heads, got {len(wrong)} other numbers "
            f"there, the first {w_hh[row, column].item():.3g} in row {row}, column {column}"
        )
    return blocks


def _r_with_z(tensor: Tensor) -> Tensor:
    """(D, 3H, …) with its first two gates changed over: r, z, n from z, r, n and the other way."""
    first, second, n = tensor.tensor_split(3, 1)
    return torch.cat((second, first, n), 1)


def _negative_z(tensor: Tensor) -> Tensor:
    """(D, 3H, …) with the z of r, z, n negated: σ(−a) = 1 − σ(a), so that it keeps what it took."""
    r, z, n = tensor.tensor_split(3, 1)
    return torch.cat((r, -z, n), 1)


def _tensors(arrays: Mapping[str, Any]) -> Weights:
    """The arrays on the CPU. Raises TypeError unless they are of one floating dtype."""
    tensors = []
    for name, array in arrays.items():
        try:
            tensors.append(_tensor(array))
        except (RuntimeError, TypeError, ValueError) as reason:  # whatever torch makes of it
            raise TypeError(
                f"{name} must be an array of numbers, got {type(array).__name__}: {reason}"
            ) from reason
    dtypes = {name: t.dtype for name, t in zip(arrays, tensors, strict=True)}
    if not tensors[0].is_floating_point() or len(set(dtypes.values())) > 1:
        raise TypeError(f"all arrays must have one floating dtype, got {dtypes}")
    return tensors


def _tensor(array: Any) -> Tensor:
    """On the CPU, from a tensor, or from whatever NumPy takes: other libraries' arrays and
    variables, which need have no more than `__array__`, and lists."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    if isinstance(array, list | tuple) and any(hasattr(row, "__array__") for row in array):
        return torch.stack([_tensor(row) for row in array])
    if not hasattr(array, "__array__"):
        return torch.tensor(array, device="cpu")
    array = array.__array__()
    # A copy, for torch takes neither the other byte order, which files have, nor negative strides.
    array = array.astype(array.dtype.newbyteorder("="), order="C")
    if array.dtype.name == "bfloat16":  # which is not NumPy's own, and torch does not know it
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _named(params: Mapping[str, Any], names: Sequence[str]) -> Weights:
    """The arrays of these names, "module/parameter" for nested ones, and no others."""
    flat = _flat(params)
    if sorted(flat) != sorted(names):
        raise ValueError(f"expected the parameters {sorted(names)}, got {sorted(flat)}")
    return _tensors({name: flat[name] for name in names})


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in params.items():
        nested = _flat(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if nested is None else {f"{name}/{k}": v for k, v in nested.items()}
    return flat


def _expect(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless the tensor has this shape, in which a letter is any size."""
    sizes = zip(shape, tensor.shape, strict=False)
    if tensor.dim() != len(shape) or any(s != t for s, t in sizes if isinstance(s, int)):
        expected = str(shape).replace("'", "")
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def _hidden_size(name: str, tensor: Tensor) -> int:
    """H of (H, 3H). Raises ValueError on another shape."""
    if tensor.dim() != 2 or tensor.shape[1] != 3 * len(tensor):
        raise ValueError(f"{name} must have shape (H, 3H), got {tuple(tensor.shape)}")
    return len(tensor)


def _expect_trigru(layer: Any) -> None:
    if not isinstance(layer, TriGRU):
        raise TypeError(f"expected a TriGRU, got {type(layer).__name__}; see TriGRU.from_torch")


def _weights(
    layer: TriGRU,
    target: str,
    *,
    variant: str | None = None,
    directions: int = 1,
    bias: bool = False,
) -> Weights:
    """Copies of the layer's weights, those of its directions stacked; where it has no biases and
    `bias` asks for them, zeros. Raises ValueError where `target` cannot compute the layer."""
    _expect_trigru(layer)
    if variant is not None and layer.variant != variant:
        raise ValueError(
            f"{target} computes variant {variant!r} only, the layer is of variant {layer.variant!r}"
        )
    if why := layer.why_not_in(target):
        raise ValueError(why)
    if layer.num_layers > 1:
        raise ValueError(
            f"{target} is one layer, got {layer.num_layers}: convert each of unstack(layer)"
        )
    if layer.bidirectional and directions == 1:
        raise ValueError(f"{target} has one direction, the layer has two")
    with torch.no_grad():
        weights = [torch.stack(kind) for kind in zip(*layer.all_weights, strict=True)]
        if bias and not layer.bias:
            zeros = weights[0].new_zeros(weights[0].shape[:2])
            weights += [zeros, zeros] if layer.variant == "torch" else [zeros]
    return weights


def _array(tensor: Tensor) -> Any:
    """A NumPy array, C-contiguous; it shares no memory with a layer, for `_weights` copied."""
    if tensor.dtype == torch.bfloat16:
        raise TypeError("NumPy has no bfloat16: convert layer.float() instead")
    return tensor.cpu().contiguous().numpy()


def _settings(layer: TriGRU) -> dict[str, Any]:
    """What tells one layer of a stack from one of another stack."""
    weight = layer.all_weights[0][0]
    names = (
        "input_size", "hidden_size", "bias", "batch_first", "bidirectional", "variant", "heads",
        "learn_reset", "clip", "save",
    )  # fmt: skip
    settings = {name: getattr(layer, name) for name in names}
    return settings | {"dtype": weight.dtype, "device": weight.device}


def _new(variant: str, weights: Weights, batch_first: bool) -> TriGRU:
    """A TriGRU of one layer with these weights."""
    w_ih, w_hh, *biases = weights
    directions = [[t[d] for t in weights] for d in range(len(w_ih))]
    return _filled(
        directions,
        input_size=w_ih.shape[2],
        hidden_size=w_hh.shape[2],
        bias=bool(biases),
        batch_first=batch_first,
        bidirectional=len(w_ih) == 2,
        variant=variant,
        dtype=w_ih.dtype,
        device=w_ih.device,
    )


def _filled(
    weights: Sequence[Sequence[Tensor]], reset_state: Tensor | None = None, **settings: Any
) -> TriGRU:
    """A TriGRU of these settings, with copies of the weights, which are as its `all_weights`, and
    of the reset state."""
    layer: Any = skip_init(TriGRU, **settings)  # draws no random numbers
    with torch.no_grad():
        for parameters, values in zip(layer.all_weights, weights, strict=True):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        if reset_state is not None:
            layer.reset_state.copy_(reset_state)
    return layer
