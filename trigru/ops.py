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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import onnx, reference
from .derivatives import LeanRecurrence, Recurrence, forward_mode
from .launch import is_exact, rounded
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
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    update_scale: Tensor | None = None,
    clip: float | None = None,
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
        resets: (T, B), bool. Where true, the state entering the step is `reset_state`, not the one
            of the step before (with `reverse`, behind): what comes before in the walk is cut off,
            in values and gradients. Data alone: nothing is compiled anew and nobody looks at it.
        reset_state: (H,), the state of a reset; None for zeros.
        update_scale: (T, B) or (T, B, H), a. The candidate's share of h' is multiplied by it: a z
            for the textbook form's z, a (1 − z) for the torch form's 1 − z. With attention it is
            AUGRU's (Zhou et al. 2019, arXiv:1809.03672), of 0 and 1 zoneout's mask.
        clip: h' is limited to ± this, as rounded to the tensors' dtype, before anything uses it, as
            in LFADS. Where it gets there no gradient passes.

    All tensors are of one floating dtype and on one device; under autocast they are cast to its
    dtype. Differentiable by autograd, to any order, in every tensor but `resets`. h0 may be float32
    where the others have 16 bits, and then h_n is: the kernels keep the state in float32, so that a
    sequence in chunks, each from the h_n before, is the whole one bit for bit.

    Returns:
        y (T, B, H), the state after every step, and h_n (B, H), the last of them.

    Raises:
        ValueError: on an unknown variant, a b_hh with the textbook variant, a reset_state without
            resets, a clip that is not above 0, or resets or an update_scale of a wrong shape or on
            another device.
        TypeError: on tensors of different dtypes or of a dtype that is not floating, resets that
            are not bool, or a clip that is no number.
        RuntimeError: on other shapes that do not go together, or tensors on different devices.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    if variant == "textbook" and b_hh is not None:
        raise ValueError("the textbook variant has one bias per gate: add b_hh to gx")
    for name, needed in (("gx", gx), ("h0", h0), ("w_hh", w_hh)):
        expect_tensor(name, needed)
    for name, optional in (("b_hh", b_hh), ("reset_state", reset_state)):
        if optional is not None:
            expect_tensor(name, optional)
    if gx.dim() != 3 or gx.shape[0] < 1 or gx.shape[2] < 3 or gx.shape[2] % 3:
        raise RuntimeError(
            f"gx must have shape (T, B, 3H) with T, H at least 1, got {tuple(gx.shape)}"
        )
    B, H = gx.shape[1], gx.shape[2] // 3
    for name, tensor, shape in (
        ("h0", h0, (B, H)),
        ("w_hh", w_hh, (3 * H, H)),
        ("b_hh", b_hh, (3 * H,)),
        ("reset_state", reset_state, (H,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise RuntimeError(
                f"{name} must have shape {shape} to go with gx {tuple(gx.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if reset_state is not None and resets is None:
        raise ValueError("a reset_state is the state of resets: give these, too")
    check_clip(clip)
    resets, update_scale = per_recurrence(resets, update_scale, gx.shape[:2], gx.device, H)
    y, h_n = recurrence(
        gx.unsqueeze(2),
        h0.unsqueeze(0),
        w_hh.unsqueeze(0),
        None if b_hh is None else b_hh.unsqueeze(0),
        None,
        resets,
        None if reset_state is None else reset_state.unsqueeze(0),
        update_scale,
        textbook=variant == "textbook",
        reverse=reverse,
        clip=clip,
    )
    return y.squeeze(2), h_n.squeeze(0)


def check_clip(clip: float | None) -> None:
    if clip is None:
        return
    if isinstance(clip, bool) or not isinstance(clip, int | float):
        raise TypeError(f"clip must be a number or None, got {type(clip).__name__}")
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")


def per_recurrence(
    resets: Tensor | None,
    update_scale: Tensor | None,
    lead: Sequence[int],
    device: torch.device,
    H: int,
    directions: int = 1,
    heads: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """What a user gives, as `recurrence` takes it, (…, D) and (…, D, H / heads), by views.

    lead: what the input has before its last dimension, (T, B) or (N,). resets: lead or, of two
    directions, (*lead, 2). update_scale: lead or (*lead, H). Raises where they are anything else.
    """
    lead = tuple(lead)
    if resets is not None:
        expect_tensor("resets", resets)
        if resets.dtype != torch.bool:
            raise TypeError(f"resets must be of torch.bool, got {resets.dtype}")
        _expect("resets", resets, [lead, (*lead, 2)][:directions], device)
        if resets.dim() == len(lead):
            resets = resets.unsqueeze(-1)
        resets = resets.unsqueeze(-1).expand(*lead, directions, heads).flatten(-2)
    if update_scale is not None:
        expect_tensor("update_scale", update_scale)
        if not update_scale.is_floating_point():
            raise TypeError(f"update_scale must be of a floating dtype, got {update_scale.dtype}")
        _expect("update_scale", update_scale, [lead, (*lead, H)], device)
        if update_scale.dim() == len(lead):
            update_scale = update_scale.unsqueeze(-1).expand(*lead, H)
        update_scale = update_scale.unsqueeze(-2).expand(*lead, directions, H)
        update_scale = update_scale.unflatten(-1, (heads, -1)).flatten(-3, -2)
    return resets, update_scale


def expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _expect(name: str, tensor: Tensor, shapes: Sequence[tuple], device: torch.device) -> None:
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as the input is, got {tensor.device}")


def resets_from_cu_seqlens(cu_seqlens: Tensor, T: int, *, bidirectional: bool = False) -> Tensor:
    """The resets of documents that lie back to back in one sequence of T steps: (T,), true where
    one begins; for a bidirectional layer (T, 2), of which the second column is true where one ends,
    which is where the second direction enters it.

    cu_seqlens: (S + 1,), int32 or int64, as flash-attention's varlen functions take them: document
    s has the steps cu_seqlens[s] … cu_seqlens[s + 1] − 1. They begin with 0, never decrease and end
    with T. An unbatched layer takes the result as it is, one with B = 1 takes its `.unsqueeze(1)`
    (with batch_first its `.unsqueeze(0)`).

    Raises TypeError on another dtype, ValueError on another shape or other values. To look at those
    on a CUDA device waits for it, once. Where that cannot be, in a compiled function and while a
    CUDA graph is captured, an assertion on the device stands for it."""
    expect_tensor("cu_seqlens", cu_seqlens)
    if isinstance(T, bool) or not isinstance(T, int | torch.SymInt):
        raise TypeError(f"T must be an int, got {type(T).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be of torch.int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
    expected = f"cu_seqlens must begin with 0, never decrease and end with T = {T}"
    if torch.compiler.is_compiling() or (
        cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    ):
        torch._assert_async(right, expected)
    elif not right:
        raise ValueError(f"{expected}, got {cu_seqlens.tolist()}")
    # A document without steps may begin behind the last step or end before the first: cut off.
    begins, ends = cu_seqlens.new_zeros(2, T + 1, dtype=torch.bool)
    begins.index_fill_(0, cu_seqlens[:-1].long(), True)
    ends.index_fill_(0, cu_seqlens[1:].long(), True)
    return torch.stack((begins[:-1], ends[1:]), 1) if bidirectional else begins[:-1]


def recurrence(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    offsets: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    update_scale: Tensor | None = None,
    *,
    textbook: bool,
    reverse: bool = False,
    heads: int = 1,
    clip: float | None = None,
    made_of: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """All recurrences of a layer, `heads` of each direction: gx (T, B, D, 3H), h0 (D, B, H), w_hh
    (D, 3H, H), b_hh (D, 3H) → y (T, B, D, H), h_n (D, B, H). With D = 2 heads those of the second
    direction run backwards in time. Packed, gx is (N, D, 3H) and y (N, D, H), and offsets (T + 1,),
    int64, tell the steps apart. All else is as in `reference`.

    made_of: x, w_ih and b_ih whose F.linear gx is, which then has no gradient itself: for the
    backward they and y are kept, not the gates. Outside of graphs and torch.func only."""
    gx, h0, w_hh, b_hh, reset_state, update_scale = autocast(
        gx, h0, w_hh, b_hh, reset_state, update_scale
    )
    named = {
        "gx": gx, "h0": h0, "w_hh": w_hh, "b_hh": b_hh, "reset_state": reset_state,
        "update_scale": update_scale,
    }  # fmt: skip
    tensors = {name: t for name, t in named.items() if t is not None}
    dtypes = {name: t.dtype for name, t in tensors.items()}
    alike = set(dtypes.values())
    if gx.dtype.itemsize == 2 and h0.dtype == torch.float32:  # more of the state than of the rest
        alike = {dtype for name, dtype in dtypes.items() if name != "h0"}
    if not gx.is_floating_point() or len(alike) > 1:
        raise TypeError(f"all tensors must have one floating dtype, got {dtypes}")
    if any(t.device != gx.device for t in tensors.values()):
        devices = {name: str(t.device) for name, t in tensors.items()}
        raise RuntimeError(f"all tensors must be on one device, got {devices}")
    *lead, D, rows = gx.shape
    H, B = rows // 3, h0.shape[1] if offsets is not None else lead[-1]
    if (h0.shape, w_hh.shape) != ((D, B, H), (D, 3 * H, H)) or (
        b_hh is not None and b_hh.shape != (D, 3 * H)
    ):
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise RuntimeError(f"gx, h0, w_hh and b_hh do not go together: {shapes}")
    # A graph holds the operator, which autograd knows too; the transforms of torch.func need more.
    compiling, tracing = torch.compiler.is_compiling(), torch.jit.is_tracing()
    if compiling and transformed():
        raise NotImplementedError(
            "a graph of torch.compile cannot hold a TriGRU inside a transform of torch.func: leave "
            "fullgraph out, or compile around the transform"
        )
    if onnx.exporting():
        if resets is not None or update_scale is not None or clip is not None:
            raise NotImplementedError("an ONNX GRU node has no resets, no update_scale and no clip")
        return onnx.recurrence_node(gx, h0, w_hh, b_hh, textbook=textbook, reverse=reverse)
    bidirectional = D == 2 * heads
    if forward_mode():
        y, h_n, _ = reference.gru_forward(
            gx, h0, w_hh, b_hh, offsets, textbook=textbook, reverse=reverse,
            bidirectional=bidirectional, heads=heads, resets=resets, reset_state=reset_state,
            update_scale=update_scale, clip=clip, save=False,
        )  # fmt: skip
        return y, h_n
    if made_of is not None:
        return LeanRecurrence.apply(
            *made_of, gx, h0, w_hh, b_hh, offsets, resets, reset_state, update_scale, textbook,
            reverse, bidirectional, heads, clip,
        )  # fmt: skip
    save = (
        torch.is_grad_enabled()
        and not tracing  # the graph must be the same with and without gradients
        # Under a transform it is seen at one level only.
        and (transformed() or any(t.requires_grad for t in tensors.values()))
    )
    function = torch.ops.trigru.forward if compiling or tracing else Recurrence.apply
    y, h_n, _ = function(
        gx, h0, w_hh, b_hh, offsets, resets, reset_state, update_scale, textbook, reverse,
        bidirectional, heads, clip, save,
    )  # fmt: skip
    return y, h_n


def keeps_a_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd itself, no compiler, tracer or transform, will want a backward of these."""
    return (
        torch.is_grad_enabled()
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not (transformed() or forward_mode())
        and any(t is not None and t.requires_grad for t in tensors)
    )


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


def autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> list[Any]:
    """The tensors in autocast's dtype where autocast is on for their device, else as they are.
    As elsewhere in PyTorch, autocast leaves float64 alone."""
    device = next(t.device.type for t in tensors if t is not None)
    if not autocasts(device):
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
    resets: Tensor | None,
    reset_state: Tensor | None,
    update_scale: Tensor | None,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
    heads: int,
    clip: float | None,
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
    if resets is not None and resets.dtype != torch.bool:
        raise TypeError(f"resets must be of torch.bool, got {resets.dtype}")
    if rounded(clip, gx.dtype) == 0:
        raise ValueError(f"clip {clip} is 0 in {gx.dtype}")
    resets, reset_state, update_scale = map(_contiguous, (resets, reset_state, update_scale))
    walk: dict[str, Any] = {
        "textbook": textbook, "reverse": reverse, "bidirectional": bidirectional, "heads": heads,
        "resets": resets, "reset_state": reset_state, "update_scale": update_scale, "clip": clip,
        "save": save,
    }  # fmt: skip
    if why_no_kernel(gx.device, gx.dtype, H, textbook) is None:
        gx, h0, w_hh, b_hh = map(_contiguous, (gx, h0, w_hh, b_hh))
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


def _contiguous(tensor: Any) -> Any:
    return None if tensor is None else tensor.contiguous()


@_forward.register_fake
def _(gx, h0, w_hh, b_hh, offsets, resets, reset_state, update_scale, textbook, reverse,
      bidirectional, heads, clip, save):  # fmt: skip
    if torch.onnx.is_in_onnx_export():  # of a graph that has the operator in place of a GRU node
        raise NotImplementedError(
            "torch.onnx.export takes no ExportedProgram with a TriGRU inside: give it the model "
            "itself, torch.onnx.export(model, args)"
        )
    shape, H = gx.shape[:-1], h0.shape[-1]  # (T, B, D) or (N, D)
    gates = gx.new_empty((*shape, 3 if textbook else 4, H) if save else 0)
    return gx.new_empty(*shape, H), h0.new_empty(h0.shape), gates


@torch.library.custom_op("trigru::backward", mutates_args=())
def _backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    update_scale: Tensor | None,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
    heads: int,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ dgx, laid out as gx; dgh, the gradients of the recurrent products, empty in the textbook
    form, where they are those of gx; dh0 (D, B, H); of the reset state's gradient the share of each
    sequence (D, B, H), and update_scale's gradient, empty where there is none of them."""
    D, B, H = h0.shape
    resets, reset_state, update_scale = map(_contiguous, (resets, reset_state, update_scale))
    walk: dict[str, Any] = {
        "textbook": textbook, "reverse": reverse, "bidirectional": bidirectional, "heads": heads,
        "resets": resets, "reset_state": reset_state, "update_scale": update_scale, "clip": clip,
    }  # fmt: skip
    if why_no_kernel(y.device, y.dtype, H, textbook) is None:
        exact = is_exact(y.dtype, y.device)
        plan = plan_for(y.device, B, H, D, y.dtype, True, textbook, exact)
        dy, dh_n, h0, w_hh, y, gates = map(_contiguous, (dy, dh_n, h0, w_hh, y, gates))
        return backward.gru_backward(dy, dh_n, h0, w_hh, y, gates, offsets, plan=plan, **walk)
    return reference.gru_backward(dy, dh_n, h0, w_hh, y, gates, offsets, **walk)


@_backward.register_fake
def _(dy, dh_n, h0, w_hh, y, gates, offsets, resets, reset_state, update_scale, textbook, reverse,
      bidirectional, heads, clip):  # fmt: skip
    dgx = y.new_empty(*y.shape[:-1], 3 * y.shape[-1])
    return (
        dgx,
        y.new_empty(0) if textbook else torch.empty_like(dgx),
        h0.new_empty(h0.shape),
        y.new_empty(0 if reset_state is None else h0.shape),
        y.new_empty(0 if update_scale is None else y.shape),
    )


_forward.register_autograd(Recurrence.backward, setup_context=Recurrence.setup_context)


# For FlopCounterMode: the recurrent products. What is multiplied around the operators, torch's own
# do, which count by themselves.
def _forward_flops(gx, h0, *args, **kwargs) -> int:
    return 2 * math.prod(gx) * h0[-1]  # of gx (T, B, D, 3H) or (N, D, 3H)


def _backward_flops(dy, dh_n, h0, w_hh, y, *args, **kwargs) -> int:
    return 2 * math.prod(y) * 3 * y[-1]


if torch.ops.trigru.forward not in flop_registry:  # it is where this module is reloaded
    register_flop_formula(torch.ops.trigru.forward)(_forward_flops)
    register_flop_formula(torch.ops.trigru.backward)(_backward_flops)
