"""`python -m trigru`: what this machine is, which path runs and why, and a self-test.

Exit code 0 only if the self-test passed."""

import itertools
import platform
import sys
from functools import partial

import torch

from . import __version__, accuracy, launch, ops
from .plan import NoPlan, device_limits

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
            for pass_ in ("forward", "backward"):
                try:
                    text = ops.plan_for(
                        device, B, H, 1, dtype, pass_ == "backward", textbook
                    ).describe(B)
                except NoPlan as reason:
                    other = "the reference" if textbook else "cuDNN, as nn.GRU"
                    text = f"{other}: {reason}"
                print(f"    H={H} B={B} {pass_}: {text}")


def self_test(device: torch.device) -> bool:
    """Both variants, forward and backward, in every dtype against float64; True if all is right."""
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.bfloat16, torch.float16]
    passed = True
    for textbook, dtype, (T, B, D, H) in itertools.product((False, True), dtypes, PROBLEMS):
        torch.manual_seed(0)
        inputs, cotangents = accuracy.problem(
            T, B, D, H, textbook=textbook, dtype=dtype, device=device
        )
        run = partial(ops.recurrence, textbook=textbook)
        actual = accuracy.differentiate(run, inputs, cotangents)
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
