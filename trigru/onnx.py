"""`TriGRU` in torch.onnx.export: a standard GRU node per layer, which any ONNX runtime knows.

While torch.onnx.export traces a model (with dynamo=True, its default), the layer puts this node
into the graph in place of the library's operator. torch.export alone keeps the operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether torch.onnx.export traces the model, by way of torch.export."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def gru_node(
    x: Tensor, h0: Tensor, weights: Sequence[Tensor], *, textbook: bool
) -> tuple[Tensor, Tensor]:
    """An ONNX GRU node, as which one layer in all its directions is exported.

    x (T, B, I), h0 (D, B, H), and the weights of `gru_inputs` → y (T, B, D · H), h_n (D, B, H).
    The node computes the input's projection too. T and B may be symbolic."""
    T, B, _ = x.shape
    D, _, H = h0.shape
    W, R, bias = gru_inputs(weights, textbook=textbook)
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "GRU",
        (x, W, R, bias, None, h0),  # None for sequence_lens: all have T steps
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            "linear_before_reset": int(not textbook),
        },
        dtypes=(x.dtype, x.dtype),
        shapes=((T, D, B, H), (D, B, H)),
    )
    y, h_n = y.to(x.device), h_n.to(x.device)  # the stand-in for the node gives the CPU's tensors
    return y.transpose(1, 2).flatten(2), h_n


def gru_inputs(
    weights: Sequence[Tensor], *, textbook: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs W (D, 3H, I), R (D, 3H, H) and B (D, 6H) of the node, B None without biases, from
    w_ih (D, 3H, I), w_hh (D, 3H, H) and, with biases, b_ih (D, 3H) and, in the torch form, b_hh.

    In the operator's equations (onnx.ai/onnx/operators/onnx__GRU.html) the gates come as z, r, h,
    and Ht = (1 − zt) ⊙ ht + zt ⊙ Ht-1. That is the torch form's z; the textbook form's is its
    opposite, and σ(−a) = 1 − σ(a)."""

    def zrh(tensor: Tensor) -> Tensor:
        r, z, n = tensor.tensor_split(3, 1)
        return torch.cat((-z if textbook else z, r, n), 1)

    W, R, *biases = (zrh(t) for t in weights)
    if not biases:
        return W, R, None
    Wb, Rb = biases if len(biases) == 2 else (biases[0], torch.zeros_like(biases[0]))
    return W, R, torch.cat((Wb, Rb), 1)
