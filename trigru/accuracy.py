"""How exact a result is and has to be: for the tests, the self-test and the benchmarks alike.

The one tolerance rule: a result may be twice as far from the float64 result as PyTorch's own is in
the same dtype on the same device (nn.GRU's; for the textbook form, that of an eager loop), plus a
floor: one rounding of the dtype, or four in float32, where the order of a sum weighs as much. Where
float32 products are of TF32, the floor is one rounding to that: cuBLAS and cuDNN leave TF32 out for
small products (one row, one unit), which the kernels do not. Distances are the largest over a
tensor, relative to the largest exact value.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .launch import uses_tf32
from .ops import without_cudnn

FACTOR = 2.0
FLOOR = {torch.float32: 4.0}  # in roundings of the dtype; 1 in others
TF32_ROUNDING = 2.0**-10


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest |actual − exact| over the largest |exact|; inf where `actual` is not finite or
    has another shape."""
    if actual.shape != exact.shape or not actual.isfinite().all():
        return float("inf")
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    difference = (actual.to(exact) - exact).abs().max().item()
    return difference / max(exact.abs().max().item(), torch.finfo(torch.float64).tiny)


def allowed_error(yardstick: Tensor, exact: Tensor) -> float:
    """The largest relative error that a result in `yardstick`'s dtype may have."""
    floor = FLOOR.get(yardstick.dtype, 1.0) * torch.finfo(yardstick.dtype).eps
    if yardstick.dtype == torch.float32 and uses_tf32(yardstick.device):
        floor = TF32_ROUNDING
    return FACTOR * relative_error(yardstick, exact) + floor


def violations(
    actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], yardstick: Mapping[str, Tensor]
) -> list[str]:
    """A line for each of the named results that breaks the rule."""
    broken = []
    for name in exact:
        error = relative_error(actual[name], exact[name])
        allowed = allowed_error(yardstick[name], exact[name])
        if not error <= allowed < math.inf:
            broken.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    return broken


def problem(
    T: int,
    B: int,
    D: int,
    H: int,
    *,
    textbook: bool,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    offsets: Tensor | None = None,
) -> tuple[dict, dict]:
    """Random inputs of a recurrence (all directions at once), and random dy and dh_n; packed, where
    there are offsets (T + 1,)."""
    scale = H**-0.5
    shape = (T, B) if offsets is None else (int(offsets[-1]),)
    inputs = {
        "gx": torch.randn(*shape, D, 3 * H),
        "h0": torch.randn(D, B, H),
        "w_hh": torch.empty(D, 3 * H, H).uniform_(-scale, scale),
        "b_hh": None if textbook else torch.empty(D, 3 * H).uniform_(-scale, scale),
    }
    cotangents = {"dy": torch.randn(*shape, D, H), "dh_n": torch.randn(D, B, H)}
    inputs = {k: None if v is None else v.to(device, dtype) for k, v in inputs.items()}
    return inputs, {k: v.to(device, dtype) for k, v in cotangents.items()}


def differentiate(function: Callable, inputs: Mapping, cotangents: Mapping) -> dict[str, Tensor]:
    """y, h_n and all gradients of `function(**inputs) -> (y, h_n)`, by autograd, by name."""
    leaves = {
        k: None if v is None else v.detach().clone().requires_grad_() for k, v in inputs.items()
    }
    y, h_n = function(**leaves)
    wanted = {k: v for k, v in leaves.items() if v is not None}
    grads = torch.autograd.grad(
        (y, h_n), [*wanted.values()], (cotangents["dy"], cotangents["dh_n"])
    )
    named = {f"d{k}": grad for k, grad in zip(wanted, grads, strict=True)}
    return {"y": y.detach(), "h_n": h_n.detach(), **named}


def eager_loop(
    *,
    textbook: bool,
    reverse: bool,
    offsets: Tensor | None = None,
    heads: int = 1,
    **modifiers: Any,
) -> Callable:
    """The reference's loop as a function of the inputs, for `differentiate`. modifiers: resets and
    clip, as the reference takes them; what is differentiable comes with the inputs."""

    def function(
        gx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Tensor | None, **differentiable: Any
    ) -> tuple:
        y, h_n, _ = reference.gru_forward(
            gx, h0, w_hh, b_hh, offsets, textbook=textbook, reverse=reverse,
            bidirectional=len(h0) == 2 * heads, heads=heads, save=False, **modifiers,
            **differentiable,
        )  # fmt: skip
        return y, h_n

    return function


def nn_gru(*, reverse: bool, offsets: Tensor | None = None) -> Callable:
    """torch.nn.GRU's function of the same inputs: its input projection is the identity."""

    def function(gx: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> tuple:
        H, bias = h0.shape[-1], b_hh is not None
        y, h_n = [], []
        for d in range(len(h0)):
            backwards = reverse or d == 1
            weights = [torch.eye(3 * H, dtype=gx.dtype, device=gx.device), w_hh[d]]
            if b_hh is not None:
                weights += [torch.zeros_like(b_hh[d]), b_hh[d]]
            x, hx = gx.select(-2, d), h0[d : d + 1].contiguous()
            if offsets is None:
                flipped = [0] if backwards else []
                x = x.flip(flipped).contiguous()
                y_d, h_d = torch.gru(x, hx, weights, bias, 1, 0.0, True, False, False)
                y_d, h_d = y_d.flip(flipped), h_d[0]
            else:  # only a layer of both directions walks packed sequences backwards
                both = hx.repeat(2, 1, 1), weights * 2
                y_d, h_d = torch.gru(
                    x.contiguous(), offsets.diff().cpu(), *both, bias, 1, 0.0, True, True
                )
                y_d, h_d = y_d.split(H, -1)[backwards], h_d[int(backwards)]
            y.append(y_d)
            h_n.append(h_d)
        return torch.stack(y, -2), torch.stack(h_n)

    return function


@contextmanager
def products_as_in_rnns() -> Iterator[None]:
    """Float32 products in TF32 or not, as PyTorch's own switch says for recurrent layers."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        matmul.fp32_precision = before


def yardsticks(
    inputs: Mapping,
    cotangents: Mapping,
    *,
    textbook: bool,
    reverse: bool = False,
    offsets: Tensor | None = None,
    **modifiers: Any,
) -> tuple[dict, dict]:
    """What the rule needs: the float64 results, and PyTorch's own in the inputs' dtype; of what
    nn.GRU cannot do, the eager loop's."""
    doubles = {k: None if v is None else v.double() for k, v in inputs.items()}
    loop = eager_loop(textbook=textbook, reverse=reverse, offsets=offsets, **modifiers)
    exact = differentiate(loop, doubles, {k: v.double() for k, v in cotangents.items()})
    is_own = not textbook and not modifiers and len(inputs) == 4
    inputs = {**inputs, "h0": inputs["h0"].to(inputs["gx"].dtype)}
    pytorch = nn_gru(reverse=reverse, offsets=offsets) if is_own else loop
    with products_as_in_rnns():
        yardstick, refusal = unless_cudnn_refuses(
            partial(differentiate, pytorch, inputs, cotangents), inputs["gx"].device
        )
    if refusal:
        warnings.warn(f"the yardstick is PyTorch's without cuDNN: {refusal}", stacklevel=2)
    return exact, yardstick


def unless_cudnn_refuses(call: Callable, device: torch.device) -> tuple[Any, str]:
    """`call()` and "" or, where cuDNN raises, as for shapes that it has no kernel for, the same
    with cuDNN off, and what cuDNN said."""
    try:
        return call(), ""
    except RuntimeError as error:
        if device.type != "cuda" or not is_refusal(error):
            raise
        with without_cudnn():
            return call(), str(error).partition("\n")[0]


def is_refusal(error: RuntimeError) -> bool:
    """Whether an error of PyTorch's GRU can be cuDNN's for want of a kernel. cuDNN has some for
    some sizes and dtypes only, and nn.GRU asks for them without a second choice. That memory runs
    out says nothing of the kind."""
    return not isinstance(error, torch.OutOfMemoryError) and "ALLOC" not in str(error)
