"""`gru`, the functional recurrence, and the two custom operators under it.

The operators take recurrences side by side, (T, B, D, …) or packed, (N, D, …), as `reference` says,
and choose where they run: the persistent kernels where a plan fits, `reference` elsewhere. All that
is parallel over time, here the weight gradients, is done around them by torch's own products.
"""

import functools
import importlib.util
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import onnx, reference
from .derivatives import Recurrence, forward_mode
from .launch import is_exact
from .plan import LaunchPlan, NoPlan, device_limits, plan_launch

if importlib.util.find_spec("triton") is None:  # it exists for Linux only
    WITHOUT_KERNELS = "Triton is not installed"
else:
    try:
        from . import backward, form, forward  # noqa: F401  (form, whose names must be there)

        WITHOUT_KERNELS = ""
    except Exception as error:  # Gluon is experimental: another Triton may have other names
        WITHOUT_KERNELS = f"the kernels do not go with the Triton that is installed: {error!r}"

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
    offsets: Tensor | None = None,
    *,
    textbook: bool,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """All directions of a layer: gx (T, B, D, 3H), h0 (D, B, H), w_hh (D, 3H, H), b_hh (D, 3H) →
    y (T, B, D, H), h_n (D, B, H). With D = 2 the second direction runs backwards in time. Packed,
    gx is (N, D, 3H) and y (N, D, H), and offsets (T + 1,), int64, tell the steps apart."""
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
    *lead, D, rows = gx.shape
    H, B = rows // 3, h0.shape[1] if offsets is not None else lead[-1]
    if (h0.shape, w_hh.shape) != ((D, B, H), (D, 3 * H, H)) or (
        b_hh is not None and b_hh.shape != (D, 3 * H)
    ):
        shapes = [tuple(t.shape) for t in tensors]
        raise RuntimeError(f"gx, h0, w_hh and b_hh do not go together: {shapes}")
    # A graph holds the operator, which autograd knows too; the transforms of torch.func need more.
    compiling, tracing = torch.compiler.is_compiling(), torch.jit.is_tracing()
    if compiling and transformed():
        raise NotImplementedError(
            "a graph of torch.compile cannot hold a TriGRU inside a transform of torch.func: leave "
            "fullgraph out, or compile around the transform"
        )
    if onnx.exporting():
        return onnx.recurrence_node(gx, h0, w_hh, b_hh, textbook=textbook, reverse=reverse)
    if forward_mode():
        y, h_n, _ = reference.gru_forward(
            gx, h0, w_hh, b_hh, offsets, textbook=textbook, reverse=reverse,
            bidirectional=D == 2, save=False,
        )  # fmt: skip
        return y, h_n
    save = (
        torch.is_grad_enabled()
        and not tracing  # the graph must be the same with and without gradients
        and (transformed() or any(t.requires_grad for t in tensors))  # seen at one level only
    )
    function = torch.ops.trigru.forward if compiling or tracing else Recurrence.apply
    y, h_n, _ = function(gx, h0, w_hh, b_hh, offsets, textbook, reverse, D == 2, save)
    return y, h_n


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


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


def why_no_kernel(device: torch.device, dtype: torch.dtype, H: int, textbook: bool) -> str | None:
    """The reason why the persistent kernels do not run here, or None if they do."""
    if device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    if torch.version.hip:
        return "the kernels are written for NVIDIA's GPUs"
    if WITHOUT_KERNELS:
        return WITHOUT_KERNELS
    if dtype not in _KERNEL_DTYPES:
        return f"the kernels compute in float16, bfloat16 and float32, not in {dtype}"
    return _why_no_plan(device, dtype, H, textbook, is_exact(dtype, device))


@functools.cache
def _why_no_plan(
    device: torch.device, dtype: torch.dtype, H: int, textbook: bool, exact: bool
) -> str | None:
    try:
        for pass_ in (False, True):
            plan_for(device, 1, H, 1, dtype, pass_, textbook, exact)
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


_cudnn_lock = threading.Lock()
_cudnn_users = 0  # calls that have switched it off, in whatever threads
_cudnn_before = True


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN's GRU has no gradients in eval mode and no second ones, and re-packs the weights with a
    warning; ATen's own does right in all of that. The switch is the whole process's: meanwhile
    other threads do without cuDNN, too. (The public `cudnn.flags` resets other flags.)"""
    global _cudnn_users, _cudnn_before
    with _cudnn_lock:
        if _cudnn_users == 0:
            _cudnn_before = torch._C._get_cudnn_enabled()
            torch._C._set_cudnn_enabled(False)
        _cudnn_users += 1
    try:
        yield
    finally:
        with _cudnn_lock:
            _cudnn_users -= 1
            if _cudnn_users == 0:
                torch._C._set_cudnn_enabled(_cudnn_before)


@functools.lru_cache(maxsize=4096)
def plan_for(
    device: torch.device, B: int, H: int, D: int, dtype: torch.dtype, backward: bool,
    textbook: bool, exact: bool = False,
) -> LaunchPlan:  # fmt: skip
    """exact: see `plan_launch`."""
    return plan_launch(
        device_limits(device),
        B=B,
        H=H,
        D=D,
        itemsize=dtype.itemsize,
        backward=backward,
        textbook=textbook,
        exact=exact,
    )


@torch.library.custom_op("trigru::forward", mutates_args=())
def _forward(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    offsets: Tensor | None,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ y (T, B, D, H) or (N, D, H), h_n (D, B, H), and the gates, as y but with (D, G, H), which
    are empty if nothing is to be saved."""
    if forward_mode():  # of a graph that holds the operator: the tangents would be lost
        raise NotImplementedError(
            "an exported or traced TriGRU has no forward-mode derivatives: differentiate the model "
            "itself"
        )
    D, B, H = h0.shape
    # A graph that was traced brings whatever its user gives it.
    if gx.shape[-2:] != (D, 3 * H) or (offsets is None and gx.shape[1:-2] != (B,)):
        raise RuntimeError(f"gx {tuple(gx.shape)} and h0 {tuple(h0.shape)} do not go together")
    walk: dict[str, Any] = {
        "textbook": textbook, "reverse": reverse, "bidirectional": bidirectional, "save": save,
    }  # fmt: skip
    if why_no_kernel(gx.device, gx.dtype, H, textbook) is None:
        gx, h0, w_hh = gx.contiguous(), h0.contiguous(), w_hh.contiguous()
        b_hh = None if b_hh is None else b_hh.contiguous()
        exact = is_exact(gx.dtype, gx.device)
        plan = plan_for(gx.device, B, H, D, gx.dtype, False, textbook, exact)
        results = forward.gru_forward(gx, h0, w_hh, b_hh, offsets, plan=plan, **walk)
    else:
        warn_of_fallback(gx.device, gx.dtype, H, textbook)
        results = reference.gru_forward(gx, h0, w_hh, b_hh, offsets, **walk)
    # Autograd lets nobody change views of many results in place, as people do with h_n: make them
    # tensors of their own, on the same memory.
    y, h_n, gates = (t.new_empty(0).set_(t) for t in results)  # type: ignore[call-overload]
    return y, h_n, gates


@_forward.register_fake
def _(gx, h0, w_hh, b_hh, offsets, textbook, reverse, bidirectional, save):
    if torch.onnx.is_in_onnx_export():  # of a graph that has the operator in place of a GRU node
        raise NotImplementedError(
            "torch.onnx.export takes no ExportedProgram with a TriGRU inside: give it the model "
            "itself, torch.onnx.export(model, args)"
        )
    shape, H = gx.shape[:-1], h0.shape[-1]  # (T, B, D) or (N, D)
    gates = gx.new_empty((*shape, 3 if textbook else 4, H) if save else 0)
    return gx.new_empty(*shape, H), gx.new_empty(h0.shape), gates


@torch.library.custom_op("trigru::backward", mutates_args=())
def _backward(
    dy: Tensor,
    dh_n: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """→ dgx, laid out as gx; dgh, the gradients of the recurrent products, empty in the textbook
    form, where they are those of gx; dh0 (D, B, H)."""
    D, B, H = h0.shape
    walk: dict[str, Any] = {
        "textbook": textbook, "reverse": reverse, "bidirectional": bidirectional,
    }  # fmt: skip
    if why_no_kernel(y.device, y.dtype, H, textbook) is None:
        exact = is_exact(y.dtype, y.device)
        plan = plan_for(y.device, B, H, D, y.dtype, True, textbook, exact)
        dy, dh_n, h0, w_hh, y, gates = (t.contiguous() for t in (dy, dh_n, h0, w_hh, y, gates))
        return backward.gru_backward(dy, dh_n, h0, w_hh, y, gates, offsets, plan=plan, **walk)
    return reference.gru_backward(dy, dh_n, h0, w_hh, y, gates, offsets, **walk)


@_backward.register_fake
def _(dy, dh_n, h0, w_hh, y, gates, offsets, textbook, reverse, bidirectional):
    dgx = y.new_empty(*y.shape[:-1], 3 * y.shape[-1])
    return dgx, y.new_empty(0) if textbook else torch.empty_like(dgx), y.new_empty(h0.shape)


_forward.register_autograd(Recurrence.backward, setup_context=Recurrence.setup_context)


# For FlopCounterMode: the recurrent products. What is multiplied around the operators, torch's own
# do, which count by themselves.
def _forward_flops(gx, h0, *args, **kwargs) -> int:
    return 2 * math.prod(gx) * h0[-1]  # of gx (T, B, D, 3H) or (N, D, 3H)


def _backward_flops(dy, dh_n, *args, **kwargs) -> int:
    return 2 * math.prod(dy) * 3 * dh_n[-1]


if torch.ops.trigru.forward not in flop_registry:  # it is where this module is reloaded
    register_flop_formula(torch.ops.trigru.forward)(_forward_flops)
    register_flop_formula(torch.ops.trigru.backward)(_backward_flops)
