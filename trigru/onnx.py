"""`TriGRU` in torch.onnx.export: a standard GRU node per layer, which any ONNX runtime knows.

While torch.onnx.export traces a model, by torch.export (dynamo=True, its default) or by TorchScript
(dynamo=False), the layer puts this node into the graph in place of the library's operator.
torch.export alone keeps the operator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def exporting() -> bool:
    """Whether torch.onnx.export traces the model."""
    tracing = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return tracing and torch.onnx.is_in_onnx_export()


def gru_node(
    x: Tensor, h0: Tensor, weights: Sequence[Tensor], *, textbook: bool
) -> tuple[Tensor, Tensor]:
    """An ONNX GRU node, as which one layer in all its directions is exported.

    x (T, B, I), h0 (D, B, H), and the weights of `gru_inputs` → y (T, B, D · H), h_n (D, B, H).
    The node computes the input's projection too. T and B may be symbolic."""
    W, R, bias = gru_inputs(weights, textbook=textbook)
    y, h_n = _node(x, h0, W, R, bias, "forward" if len(R) == 1 else "bidirectional", textbook)
    return y.transpose(1, 2).flatten(2), h_n


def recurrence_node(
    gx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Tensor | None, *, textbook: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """A node for `ops.recurrence` of padded sequences: it projects gx by the identity."""
    D, rows, _ = w_hh.shape
    w_ih = torch.eye(D * rows, dtype=gx.dtype, device=gx.device).unflatten(0, (D, rows))
    weights = [w_ih, w_hh] if b_hh is None else [w_ih, w_hh, torch.zeros_like(b_hh), b_hh]
    W, R, bias = gru_inputs(weights, textbook=textbook)
    direction = "bidirectional" if D == 2 else "reverse" if reverse else "forward"
    y, h_n = _node(gx.flatten(2), h0, W, R, bias, direction, textbook)
    return y.transpose(1, 2), h_n


def _node(
    x: Tensor, h0: Tensor, W: Tensor, R: Tensor, bias: Tensor | None, direction: str, textbook: bool
) -> tuple[Tensor, Tensor]:
    """→ y (T, D, B, H), h_n (D, B, H), which stand in for the node's while the model is traced."""
    if not torch.compiler.is_exporting():
        return _ScriptNode.apply(x, W, R, bias, h0, int(R.shape[2]), direction, textbook)
    T, B, _ = x.shape
    D, _, H = R.shape
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "GRU",
        (x, W, R, bias, None, h0),  # None for sequence_lens: all have T steps
        {"hidden_size": H, "direction": direction, "linear_before_reset": int(not textbook)},
        dtypes=(x.dtype, x.dtype),
        shapes=((T, D, B, H), (D, B, H)),
    )
    return y.to(x.device), h_n.to(x.device)  # the stand-in for the node gives the CPU's tensors


class _ScriptNode(torch.autograd.Function):
    """The node for the exporter by TorchScript."""

    @staticmethod
    def forward(ctx, x, W, R, bias, h0, H, direction, textbook):
        return x.new_zeros(len(x), *h0.shape), h0.new_zeros(h0.shape)

    @staticmethod
    def symbolic(g, x, W, R, bias, h0, H, direction, textbook):
        absent = g.op("prim::Constant")
        absent.setType(torch.OptionalType.ofTensor())
        return g.op(
            "GRU", x, W, R, absent if bias is None else bias, absent, h0,
            hidden_size_i=H, direction_s=direction, linear_before_reset_i=int(not textbook),
            outputs=2,
        )  # fmt: skip


def gru_inputs(
    weights: Sequence[Tensor], *, textbook: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs W (D, 3H, I), R (D, 3H, H) and B (D, 6H) of the node, B None without biases, from
    w_ih (D, 3H, I), w_hh (D, 3H, H) and, with biases, b_ih (D, 3H) and, in the torch form, b_hh.

    In the operator's equations (onnx.ai/onnx/operators/onnx__GRU.html) the gates come as z, r, h,
    and Ht = (1 − zt) ⊙ ht + zt ⊙ Ht-1. That is the torch form's z; the textbook form's is its
    opposite, and σ(−a) = 1 − σ(a)."""

    H = int(weights[1].shape[2])

    def zrh(tensor: Tensor) -> Tensor:
        # Slices of constants are constants to both exporters.
        r, z, n = tensor[:, :H], tensor[:, H : 2 * H], tensor[:, 2 * H :]
        return torch.cat((-z if textbook else z, r, n), 1)

    W, R, *biases = (zrh(t) for t in weights)
    if not biases:
        return W, R, None
    Wb, Rb = biases if len(biases) == 2 else (biases[0], torch.zeros_like(biases[0]))
    return W, R, torch.cat((Wb, Rb), 1)
