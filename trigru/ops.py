"""`gru`, the functional recurrence, and the two custom operators under it.

The operators take both directions of a layer at once, (T, B, D, …), and choose where they run:
the persistent kernels where a plan fits, `reference` elsewhere. All that is parallel over time,
here the weight gradients, is done around them by torch's own products.
"""

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from . import reference
from .plan import LaunchPlan, NoPlan, device_limits, plan_launch

HAS_TRITON = importlib.util.find_spec("triton") is not None  # it exists for Linux only
if HAS_TRITON:
    from . import backward, forward

VARIANTS = ("torch", "textbook")
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gru(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None = None,
    *,
    variant: str = "torch",
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The GRU recurrence over an input projection, for those who build their own layers.

    variant "torch", as torch.nn.GRU (r, z, n are the three parts of gx, in this order)::

        r = σ(gx_r + U_r h + b_r)        n = tanh(gx_n + r ⊙ (U_n h + b_n))
        z = σ(gx_z + U_z h + b_z)        h' = (1 − z) ⊙ n + z ⊙ h

    variant "textbook" (Chung et al. 2014, arXiv:1412.3555), whose one bias per gate is in gx::

        r = σ(gx_r + U_r h)              n = tanh(gx_n + U_n (r ⊙ h))
        z = σ(gx_z + U_z h)              h' = (1 − z) ⊙ h + z ⊙ n

    Args:
        gx: (T, B, 3H), T ≥ 1, the input projection of every step, W x + b.
        h0: (B, H), the initial state.
        w_hh: (3H, H), U_r, U_z and U_n on top of each other.
        b_hh: (3H,), b_r, b_z and b_n, or None for none.
        variant: "torch" or "textbook".
        reverse: walk from the last step to the first; y[t] is still the state after step t.

    All tensors are of one floating dtype and on one device; under autocast they are cast to its
    dtype. Differentiable by autograd, to any order, in every tensor.

    Returns:
        y (T, B, H), the state after every step, and h_n (B, H), the last of them.

    Raises:
        ValueError: on an unknown variant, or a b_hh with the textbook variant.
        TypeError: on tensors of different dtypes or of a dtype that is not floating.
        RuntimeError: on shapes that do not go together, or tensors on different devices.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if variant == "textbook" and b_hh is not None:
        raise ValueError("the textbook variant has one bias per gate: add b_hh to gx")
    if gx.dim() != 3 or gx.shape[0] < 1 or gx.shape[2] < 3 or gx.shape[2] % 3:
        raise RuntimeError(
            f"gx must have shape (T, B, 3H) with T, H at least 1, got {tuple(gx.shape)}"
        )
    B, H = gx.shape[1], gx.shape[2] // 3
    for name, tensor, shape in (
        ("h0", h0, (B, H)),
        ("w_hh", w_hh, (3 * H, H)),
        ("b_hh", b_hh, (3 * H,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(
                f"{name} must have shape {shape} to go with gx {tuple(gx.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    y, h_n = recurrence(
        gx.unsqueeze(2),
        h0.unsqueeze(0),
        w_hh.unsqueeze(0),
        None if b_hh is None else b_hh.unsqueeze(0),
        textbook=variant == "textbook",
        reverse=reverse,
    )
    return y.squeeze(2), h_n.squeeze(0)


def recurrence(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    *,
    textbook: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """All directions of a layer: gx (T, B, D, 3H), h0 (D, B, H), w_hh (D, 3H, H), b_hh (D, 3H) →
    y (T, B, D, H), h_n (D, B, H). With D = 2 the second direction runs backwards in time."""
    gx, h0, w_hh, b_hh = autocast(gx, h0, w_hh, b_hh)
    tensors = [t for t in (gx, h0, w_hh, b_hh) if t is not None]
    if not gx.is_floating_point() or any(t.dtype != gx.dtype for t in tensors):
        raise TypeError(
            f"all tensors must have one floating dtype, got {[t.dtype for t in tensors]}"
        )
    if any(t.device != gx.device for t in tensors):
        raise RuntimeError(
            f"all tensors must be on one device, got {[str(t.device) for t in tensors]}"
        )
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, h_n, _, _ = torch.ops.trigru.forward(gx, h0, w_hh, b_hh, textbook, reverse, save)
    return y, h_n


def autocast(*tensors: Any) -> list[Any]:
    """The tensors in autocast's dtype where autocast is on for their device, else as they are.
    As elsewhere in PyTorch, autocast leaves float64 alone."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


@functools.cache
def why_no_kernel(device: torch.device, dtype: torch.dtype, H: int, textbook: bool) -> str | None:
    """The reason why the persistent kernels do not run here, or None if they do."""
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip:
        return "the kernels are written for NVIDIA's GPUs"
    if not HAS_TRITON:
        return "Triton is not installed"
    if dtype not in _KERNEL_DTYPES:
        return f"the kernels compute in float16, bfloat16 and float32, not in {dtype}"
    try:
        for pass_ in (False, True):
            plan_for(device, 1, H, 1, dtype, pass_, textbook)
    except NoPlan as reason:
        return str(reason)
    return None


def warn_of_fallback(device: torch.device, dtype: torch.dtype, H: int, textbook: bool) -> None:
    """Say once for each reason that a CUDA tensor takes the slow path."""
    reason = why_no_kernel(device, dtype, H, textbook)
    if device.type == "cuda" and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"TriGRU falls back to a slower path: {reason}", stacklevel=3)


_warned: set[str | None] = set()


@functools.lru_cache(maxsize=4096)
def plan_for(
    device: torch.device, B: int, H: int, D: int, dtype: torch.dtype, backward: bool, textbook: bool
) -> LaunchPlan:
    return plan_launch(
        device_limits(device),
        B=B,
        H=H,
        D=D,
        itemsize=dtype.itemsize,
        backward=backward,
        textbook=textbook,
    )


@torch.library.custom_op("trigru::forward", mutates_args=())
def _forward(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    textbook: bool,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ y (T, B, D, H), h_n (D, B, H), gates (T, B, D, G, H), r ⊙ h (T, B, D, H), the last two
    empty if nothing is to be saved (r ⊙ h also in the torch form)."""
    D, B, H = h0.shape
    if why_no_kernel(gx.device, gx.dtype, H, textbook) is None:
        return forward.gru_forward(
            gx.contiguous(),
            h0.contiguous(),
            w_hh.contiguous(),
            None if b_hh is None else b_hh.contiguous(),
            textbook=textbook,
            reverse=reverse,
            save=save,
            plan=plan_for(gx.device, B, H, D, gx.dtype, False, textbook),
        )
    warn_of_fallback(gx.device, gx.dtype, H, textbook)
    return reference.gru_forward(gx, h0, w_hh, b_hh, textbook=textbook, reverse=reverse, save=save)


@_forward.register_fake
def _(gx, h0, w_hh, b_hh, textbook, reverse, save):
    T, B, D, _ = gx.shape
    H = h0.shape[-1]
    gates = gx.new_empty((T, B, D, 3 if textbook else 4, H) if save else 0)
    rh = gx.new_empty((T, B, D, H) if save and textbook else 0)
    return gx.new_empty(T, B, D, H), gx.new_empty(D, B, H), gates, rh


@torch.library.custom_op("trigru::backward", mutates_args=())
def _backward(
    dy: Tensor,
    dh_n: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    rh: Tensor,
    textbook: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ dgx (T, B, D, 3H), dh0 (D, B, H), dw_hh (D, 3H, H), db_hh (D, 3H)."""
    D, B, H = h0.shape
    dy, dh_n, h0, w_hh, y = (t.contiguous() for t in (dy, dh_n, h0, w_hh, y))
    if why_no_kernel(y.device, y.dtype, H, textbook) is None:
        plan = plan_for(y.device, B, H, D, y.dtype, True, textbook)
        dgx, dgh, dh0 = backward.gru_backward(
            dy, dh_n, h0, w_hh, y, gates.contiguous(), textbook=textbook, reverse=reverse, plan=plan
        )
    else:
        dgx, dgh, dh0 = reference.gru_backward(
            dy, dh_n, h0, w_hh, y, gates, textbook=textbook, reverse=reverse
        )
    before = reference.states_before(y, h0, reverse=reverse)
    dw_hh, db_hh = weight_gradients(dgh, before, rh if textbook else before)
    return dgx, dh0, dw_hh, db_hh


@_backward.register_fake
def _(dy, dh_n, h0, w_hh, y, gates, rh, textbook, reverse):
    T, B, D, H = y.shape
    new = y.new_empty
    return new(T, B, D, 3 * H), new(D, B, H), new(D, 3 * H, H), new(D, 3 * H)


def weight_gradients(dgh: Tensor, operand_rz: Tensor, operand_n: Tensor) -> tuple[Tensor, Tensor]:
    """dw_hh (D, 3H, H) and db_hh (D, 3H) from dgh (T, B, D, 3H), the gradients of the recurrent
    products, and what U_r, U_z and U_n were multiplied by, each (T, B, D, H)."""
    T, B, _, H = operand_rz.shape
    # One product over all steps. The CPU's adds up long sums less exactly than PyTorch's GRU, which
    # takes them step by step, so there the sum is one of short ones.
    steps = T if dgh.is_cuda else max(1, 64 // max(1, B))

    def product(gradients: Tensor, operand: Tensor) -> Tensor:  # (D, …, H), summed over T and B
        parts = zip(gradients.split(steps), operand.split(steps), strict=True)
        products = (
            torch.bmm(g.flatten(0, 1).permute(1, 2, 0), o.flatten(0, 1).transpose(0, 1))
            for g, o in parts
        )
        return functools.reduce(torch.add, products)

    if operand_n is operand_rz:
        dw_hh = product(dgh, operand_rz)
    else:
        dw_hh = torch.cat(
            (product(dgh[..., : 2 * H], operand_rz), product(dgh[..., 2 * H :], operand_n)), dim=1
        )
    return dw_hh, dgh.sum((0, 1))


def _setup_context(ctx, inputs, output):
    _, h0, w_hh, b_hh, ctx.textbook, ctx.reverse, _ = inputs
    y, _, gates, rh = output
    ctx.has_bias = b_hh is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rh)
    ctx.save_for_backward(h0, w_hh, y, gates, rh)


def _differentiate(ctx, dy, dh_n, dgates, _):
    """Gradients of gx, h0, w_hh and b_hh.

    The saved gates are an output of the operator so that a second derivative can flow through
    them: under `create_graph` the walk back is `reference`'s own, made of differentiable torch
    operations on h0, w_hh, y and the gates, and what it sends to the gates returns here as
    `dgates`. r ⊙ h is recomputed in that case, so it needs no gradient of its own."""
    h0, w_hh, y, gates, rh = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dh_n = torch.zeros_like(h0) if dh_n is None else dh_n
    if dgates is None and not torch.is_grad_enabled():
        dgx, dh0, dw_hh, db_hh = torch.ops.trigru.backward(
            dy, dh_n, h0, w_hh, y, gates, rh, ctx.textbook, ctx.reverse
        )
    else:
        dgx, dgh, dh0 = reference.gru_backward(
            dy, dh_n, h0, w_hh, y, gates, textbook=ctx.textbook, reverse=ctx.reverse, dgates=dgates
        )
        before = reference.states_before(y, h0, reverse=ctx.reverse)
        reset = gates[..., 0, :] * before if ctx.textbook else before
        dw_hh, db_hh = weight_gradients(dgh, before, reset)
    return dgx, dh0, dw_hh, db_hh if ctx.has_bias else None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
