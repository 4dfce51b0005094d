"""What is compared: TriGRU, PyTorch's own GRU, and a plain loop for the textbook equation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.backends.cudnn.rnn
from torch import Tensor, nn

import trigru

from .shapes import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Weights = dict[str, Tensor]  # by nn.GRU's names
Layer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x, h0 → y, h_n


class Provider(NamedTuple):
    """A layer that is ready to be called, and the parameters to differentiate it in."""

    layer: Layer
    parameters: list[Tensor]


Build = Callable[[Case, Weights, bool], Provider]  # the last: whether in training mode


def builders(variant: str, device: torch.device) -> dict[str, Build]:
    """The providers of a variant by name, the yardstick first."""
    if variant == "textbook":
        return {"eager": build_eager, "trigru": build_trigru}
    return {"cudnn" if device.type == "cuda" else "aten": build_torch, "trigru": build_trigru}


def build_trigru(case: Case, weights: Weights, training: bool) -> Provider:
    """trigru.TriGRU. Raises RuntimeError on a GPU where none of its kernels fits and it would
    measure its fallback."""
    like = weights["weight_hh_l0"]
    if like.device.type == "cuda":
        textbook = case.variant == "textbook"
        reason = trigru.ops.why_no_kernel(like.device, like.dtype, case.H, textbook)
        if reason is not None:
            raise RuntimeError(f"no kernel: {reason}")
    layer = trigru.TriGRU(
        case.I, case.H, case.layers, bidirectional=case.directions == 2,
        device=like.device, dtype=like.dtype, variant=case.variant,
    )  # fmt: skip
    return _loaded(layer, weights, training)


def build_torch(case: Case, weights: Weights, training: bool) -> Provider:
    """torch.nn.GRU, its weights in the one piece that cuDNN wants."""
    like = weights["weight_hh_l0"]
    layer = nn.GRU(
        case.I, case.H, case.layers, bidirectional=case.directions == 2,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    provider = _loaded(layer, weights, training)
    flatten(layer)
    return provider


def build_eager(case: Case, weights: Weights, training: bool) -> Provider:
    """The textbook equation as a loop of torch operations, for one layer in one direction."""
    if case.layers != 1 or case.directions != 1:
        raise ValueError("the eager loop has one layer and one direction")
    leaves = [w.detach().clone().requires_grad_() for w in weights.values()]
    w_ih, w_hh, b = leaves
    return Provider(lambda x, h0: textbook_loop(x, h0, w_ih, w_hh, b), leaves)


def textbook_loop(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """x (T, B, I), h0 (1, B, H) → y (T, B, H), h_n (1, B, H).

    The input projection of all steps is one product, and so are the two gates that do not wait
    for r: what a person would write who wants the loop to be fast."""
    H = h0.shape[-1]
    gx = nn.functional.linear(x, w_ih, b).split((2 * H, H), dim=-1)
    u_rz, u_n = w_hh[: 2 * H].t(), w_hh[2 * H :].t()
    h, y = h0[0], []
    for gx_rz, gx_n in zip(*(part.unbind(0) for part in gx), strict=True):
        r, z = torch.sigmoid(torch.addmm(gx_rz, h, u_rz)).chunk(2, dim=-1)
        n = torch.tanh(torch.addmm(gx_n, r * h, u_n))
        h = torch.lerp(h, n, z)  # (1 − z) ⊙ h + z ⊙ n
        y.append(h)
    return torch.stack(y), h.unsqueeze(0)


def flatten(layer: nn.GRU) -> None:
    """Lay the weights out in one piece, so that cuDNN need not copy them at every call.

    nn.GRU does so itself, but not in bfloat16, which its list of cuDNN's dtypes lacks."""
    layer.flatten_parameters()
    weights: Any = layer._flat_weights
    if weights[0].is_cuda and weights[0].dtype == torch.bfloat16:
        with torch.no_grad(), torch.cuda.device_of(weights[0]):
            torch._cudnn_rnn_flatten_weight(
                weights, len(layer._all_weights[0]), layer.input_size,
                torch.backends.cudnn.rnn.get_cudnn_mode("GRU"), layer.hidden_size, 0,
                layer.num_layers, layer.batch_first, layer.bidirectional,
            )  # fmt: skip


def _loaded(layer: nn.Module, weights: Weights, training: bool) -> Provider:
    layer.load_state_dict(weights)
    parameters = dict(layer.named_parameters())
    return Provider(layer.train(training), [parameters[name] for name in weights])
