"""Launching a persistent kernel, and turning a wait that ran out into an exception."""

import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .plan import MAX_GRID, LaunchPlan

# After so many looks at what is not there a wait gives up: some seconds, as one takes a few tenths
# of a microsecond. Those after it in the same launch give up soon.
WAIT_POLLS = 20_000_000

_error_flags: dict[torch.device, Tensor] = {}
_error_flags_lock = threading.Lock()  # two threads must not each make one


class ExchangeTimeout(RuntimeError):
    """A program of a persistent launch waited too long for another one's data."""


def error_flag(device: torch.device) -> Tensor:
    """The int32 that a failed wait on this device, an index included, sets. It is host memory that
    the device can write, so that the host can look at it at any time without waiting for it."""
    with _error_flags_lock:
        if device not in _error_flags:
            flag = torch.zeros(1, dtype=torch.int32)
            _error_flags[device] = flag.pin_memory() if device.type == "cuda" else flag
        return _error_flags[device]


def raise_if_failed(device: torch.device | str | int) -> None:
    """Raise `ExchangeTimeout` if a launch on this device gave up waiting.

    device: anything that `torch.device` takes, with the current device where it names none.

    Launches are asynchronous, as everything on a GPU: the error of one is raised by the call that
    follows it, or by this function after a `torch.cuda.synchronize()`. What was launched between
    the two may be NaN, too."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    flag = _error_flags.get(device)
    if flag is not None and flag.item():
        flag.zero_()
        raise ExchangeTimeout(
            f"a TriGRU launch on {device} gave up waiting for data from one of its own programs; "
            "its results are NaN from there on. The programs of a launch must all run at the same "
            "time: is another process holding the device, or a debugger stopping it?"
        )


def uses_tf32(device: torch.device) -> bool:
    """Whether float32 products of recurrent layers are of TF32 there, by PyTorch's own switch."""
    precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return device.type == "cuda" and precision == "tf32"


def is_exact(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether recurrent products of this type are float32's there, not TF32's."""
    return dtype == torch.float32 and not uses_tf32(device)


def on_device(device: torch.device) -> AbstractContextManager:
    """Where launches of this device's tensors must be made."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def compile_options() -> dict[str, Any]:
    """Triton's options for every kernel: one stage, and FMAs, which Triton 3.10 leaves out unless
    it is asked for them."""
    from triton.backends.nvidia.compiler import CUDAOptions  # Triton is not on every machine

    options = {"num_stages": 1, "enable_fp_fusion": True}
    return {name: value for name, value in options.items() if hasattr(CUDAOptions, name)}


def packed_resets(
    resets: Tensor | None,
    offsets: Tensor | None,
    B: int,
    plan: LaunchPlan,
    against: bool,
    **walk: int,
) -> Tensor | None:
    """resets (T, B, D) or (N, D), bool, as a kernel with this plan reads them: see `tiles`.

    against: whether it walks against the direction of the forward pass, which `walk` tells."""
    if resets is None or B == 0:
        return None
    from . import tiles  # Triton is not on every machine

    T = resets.shape[0] if offsets is None else len(offsets) - 1
    D, words = resets.shape[-1], -(-T // 32) + 1
    packed = resets.new_empty((D, words, B), dtype=torch.int32)
    grid = words, min(-(-B // plan.rows), MAX_GRID), min(D, MAX_GRID)
    with on_device(resets.device):
        tiles._pack_resets_kernel[grid](
            resets.view(torch.uint8), packed, offsets, T, B, plan.rows, D=D, **walk,
            AGAINST=against, BLOCK=plan.BLOCK_B, num_warps=1,
        )  # fmt: skip
    return packed


def rounded(clip: float | None, dtype: torch.dtype) -> float | None:
    """The clip as a state of this type can have it, by which whoever sees the state knows it."""
    return None if clip is None else torch.tensor(clip, dtype=dtype).item()


def compile_time(plan: LaunchPlan, exact: bool, **switches: int) -> dict[str, Any]:
    """The kernel's constexpr arguments for a plan, by name."""
    from .form import Form  # Triton is not on every machine

    form = Form(
        H=plan.H, H_PAD=plan.H_pad, BLOCK_H=plan.BLOCK_H, BLOCK_B=plan.BLOCK_B,
        WARPS=plan.num_warps, BITS=plan.bits, SPLIT_K=plan.num_warps if plan.split else 1,
        CHUNKS=plan.chunks, STAGES=plan.stages, SOLO=plan.solo, U_SHARED=plan.u_shared,
        WGMMA=plan.wgmma, EXACT=exact, NEWER=plan.newer,
    )  # fmt: skip
    return {"D": plan.D, "FORM": form, **switches}


def launch(
    kernel: Any,
    arguments: tuple,
    like: Tensor,
    offsets: Tensor | None,
    shape: Sequence[int],
    B: int,
    plan: LaunchPlan,
    **switches: int,
) -> None:
    """Launch `kernel` over B sequences as `plan` says: once, or once for each part of D.

    like: of what is multiplied, for its device and dtype. shape: (T, B), or (N,) with offsets
    (T + 1,)."""
    if B == 0:
        return
    T = shape[0] if offsets is None else len(offsets) - 1
    device, dtype = like.device, like.dtype
    raise_if_failed(device)
    groups, tiles_at_once, _ = plan.grid(B)
    exact = is_exact(dtype, device)
    constants = compile_time(plan, exact, **switches)
    with on_device(device):
        for first_direction in range(0, plan.D, plan.directions):
            directions = min(plan.directions, plan.D - first_direction)
            kernel[(groups, tiles_at_once, directions)](
                *arguments,
                offsets,
                error_flag(device),
                T,
                B,
                plan.rows,
                WAIT_POLLS,
                first_direction,
                **constants,
                **compile_options(),
                num_warps=plan.num_warps,
                # A solo grid may be larger than the device; a group that is must fail, not hang.
                launch_cooperative_grid=not plan.solo,
            )
