"""`python -m trigru`: what this machine is, which path runs and why, and a self-test.

Exit code 0 only if the self-test passed."""

import itertools
import platform
import sys
from collections.abc import Mapping
from functools import partial

import torch

from . import __version__, accuracy, launch, ops
from .plan import device_limits

SHAPES = ((64, 16), (128, 256), (256, 32), (512, 1), (1024, 64), (2048, 16), (4096, 16))  # H, B
# T, B, D, H of the self-test: one program alone, a group, and both directions with padding.
PROBLEMS = ((12, 5, 1, 64), (12, 33, 1, 256), (7, 3, 2, 200))


def versions() -> str:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return (
        f"TriGRU {__version__}, torch {torch.__version__}, triton {triton_version}, "
        f"Python {platform.python_version()}"
    )


def describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"CPU ({torch.get_num_threads()} threads); no CUDA device, so no kernel runs here"
    limits = device_limits(device)
    major, minor = limits.capability
    return (
        f"{limits.name}: compute capability {major}.{minor}, {limits.sm_count} SMs, "
        f"{limits.shared_bytes // 1024} KiB of shared memory for each program"
    )


def describe_paths(device: torch.device) -> None:
    """Print which path a layer takes on this device for a few shapes, and why."""
    if device.type != "cuda":
        print("  variant torch:    ATen's GRU, as nn.GRU")
        print("  variant textbook: the reference, a loop of torch operations")
        return
    for textbook, dtype in itertools.product((False, True), (torch.bfloat16, torch.float32)):
        print(f"  variant {'textbook' if textbook else 'torch'}, {dtype}")
        for H, B in SHAPES:
            if reason := ops.why_no_kernel(device, dtype, H, textbook):
                other = "the reference" if textbook else "ATen's GRU, without cuDNN"
                print(f"    H={H} B={B}: {other}: {reason}")
                continue
            for pass_ in ("forward", "backward"):
                exact = launch.is_exact(dtype, device)
                plan = ops.plan_for(device, B, H, 1, dtype, pass_ == "backward", textbook, exact)
                print(f"    H={H} B={B} {pass_}: {plan.describe(B)}")


def problems(device: torch.device) -> list[tuple[bool, torch.dtype, tuple[int, int, int, int]]]:
    """Those of the self-test: whether textbook, the dtype, the shape."""
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.bfloat16, torch.float16]
    return list(itertools.product((False, True), dtypes, PROBLEMS))


def computed(inputs: Mapping, cotangents: Mapping, textbook: bool) -> dict[str, torch.Tensor]:
    """What TriGRU makes of a problem."""
    run = partial(ops.recurrence, textbook=textbook)
    return accuracy.differentiate(run, inputs, cotangents)


def self_test(device: torch.device) -> bool:
    """Both variants, forward and backward, in every dtype against float64; True if all is right."""
    passed = True
    for textbook, dtype, (T, B, D, H) in problems(device):
        torch.manual_seed(0)
        inputs, cotangents = accuracy.problem(
            T, B, D, H, textbook=textbook, dtype=dtype, device=device
        )
        actual = computed(inputs, cotangents, textbook)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            launch.raise_if_failed(device)
        exact, yardstick = accuracy.yardsticks(inputs, cotangents, textbook=textbook)
        broken = accuracy.violations(actual, exact, yardstick)
        share = max(
            accuracy.relative_error(actual[name], exact[name])
            / accuracy.allowed_error(yardstick[name], exact[name])
            for name in exact
        )
        variant = "textbook" if textbook else "torch"
        name = str(dtype).removeprefix("torch.")
        shape = f"T={T} B={B} directions={D} H={H}"
        print(f"  {variant:8} {name:8} {shape}: largest error {share:.2f} of what is allowed")
        for line in broken:
            print(f"    {line}")
        passed = passed and not broken
    return passed


def main() -> int:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    print(versions())
    print(describe_device(device))
    print("\nWhich path runs")
    describe_paths(device)
    print("\nSelf-test: y, h_n and every gradient against float64, by the tolerance rule")
    passed = self_test(device)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
