"""`python -m perf static`: what a MODEL expects of a step's kernels on devices that are not here.

Every kernel is planned for a device's limits, compiled for it, and its time loop read by perf.sass.
No number in the table was measured: the column `kind` says so in every row. The model's latencies
are those of an H100 whatever the device; of the others only the rates of `DEVICES` are known.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trigru import exchange
from trigru.plan import LaunchPlan, NoPlan, plan_launch

from .compiling import TARGETS, Compiled, compile_plan
from .measure import append_row, kernel_hash
from .progress import tqdm
from .sass import H100, Estimate, Parameters, estimate, publish_lines
from .shapes import VARIANTS

KIND = "model, not measured"
DTYPE = torch.bfloat16
STEPS_PER_PASS = 2  # of the kernels' time loops
SHAPES = (  # H, B
    (128, 16), (128, 1024), (128, 4096), (256, 16), (256, 64), (256, 1024), (256, 4096),
    (512, 16), (512, 256), (512, 4096), (768, 16), (1024, 16),
)  # fmt: skip
TEXTBOOK_SHAPES = ((512, 16),)


class Device(NamedTuple):
    """What the model is told of a device beside its limits, from the vendor's data sheets."""

    mhz: float  # boost clock
    params: Parameters


# hmma_interval: 4096 FLOPs of a product of 16 × 8 × 16 over those of a scheduler's tensor core in a
# clock, bf16 with fp32 sums: 312 TFLOPS of 108 SMs at 1410 MHz, 71 of 82 at 1695, 209.5 of 170 at
# 2407.
DEVICES = {
    90: Device(1755, H100),
    80: Device(1410, replace(H100, hmma_interval=8.0)),
    86: Device(1695, replace(H100, hmma_interval=32.0)),
    120: Device(2407, replace(H100, hmma_interval=32.0)),
}

COLUMNS = (
    "kind", "device", "sm", "clock_mhz", "kernel_hash", "dtype", "variant", "pass", "H", "B",
    "resets", "regime", "BLOCK_H", "rows", "warps", "grid", "rounds", "clocks", "clocks_low",
    "clocks_high", "us_per_step", "registers", "spills", "shared_bytes", "barriers", "instructions",
)  # fmt: skip


class Kernel(NamedTuple):
    """One row of the table."""

    sm: int
    variant: str
    backward: bool
    H: int
    B: int
    resets: bool = False


def kernels() -> Iterator[Kernel]:
    """All rows, device by device; of the first one also those of kernels with resets."""
    for sm, variant in product(DEVICES, VARIANTS):
        shapes = TEXTBOOK_SHAPES if variant == "textbook" else SHAPES
        for (H, B), backward in product(shapes, (False, True)):
            yield Kernel(sm, variant, backward, H, B)
            if sm == 90:
                yield Kernel(sm, variant, backward, H, B, resets=True)


def write_static(path: Path) -> None:
    """Write the table anew, row by row as they are computed."""
    path.unlink(missing_ok=True)
    for kernel in tqdm(list(kernels()), desc="static"):
        try:
            append_row(path, COLUMNS, row_of(kernel))
        except NoPlan as error:
            tqdm.write(f"no plan: {error}")


def row_of(kernel: Kernel) -> dict[str, Any]:
    """Plan, compile and estimate one kernel. Raises NoPlan."""
    limits, device, textbook = TARGETS[kernel.sm], DEVICES[kernel.sm], kernel.variant == "textbook"
    plan = plan_launch(
        limits, B=kernel.B, H=kernel.H, D=1, itemsize=DTYPE.itemsize, backward=kernel.backward,
        textbook=textbook,
    )  # fmt: skip
    compiled, step = estimated(kernel.sm, plan, kernel.backward, textbook, resets=kernel.resets)
    repeated = plan.rounds(kernel.B)
    return {
        "kind": KIND, "device": limits.name, "sm": kernel.sm, "clock_mhz": device.mhz,
        "kernel_hash": kernel_hash(), "dtype": "bf16", "variant": kernel.variant,
        "pass": "backward" if kernel.backward else "forward", "H": kernel.H, "B": kernel.B,
        "resets": int(kernel.resets), "regime": plan.regime, "BLOCK_H": plan.BLOCK_H,
        "rows": plan.rows, "warps": plan.num_warps,
        "grid": "x".join(map(str, plan.grid(kernel.B))), "rounds": repeated,
        "clocks": round(step.clocks), "clocks_low": round(step.low),
        "clocks_high": round(step.high),
        "us_per_step": f"{repeated * step.clocks / device.mhz:.3f}",
        "registers": compiled.registers, "spills": step.spills,
        "shared_bytes": compiled.shared_bytes, "barriers": step.barriers,
        "instructions": round(sum(step.issued.values())),
    }  # fmt: skip


@functools.cache
def estimated(
    sm: int,
    plan: LaunchPlan,
    backward: bool,
    textbook: bool,
    dtype: torch.dtype = DTYPE,
    resets: bool = False,
) -> tuple[Compiled, Estimate]:
    """A plan's kernel, and what one step of one program costs. Many batches have the same one."""
    compiled = compile_plan(sm, plan, dtype, backward=backward, textbook=textbook, resets=resets)
    step = estimate(
        compiled.cubin, num_warps=plan.num_warps, steps_per_pass=STEPS_PER_PASS,
        publish_lines=publish_lines(exchange.__file__),
        rows_frac=plan.rows / plan.BLOCK_B, params=DEVICES[sm].params,
    )  # fmt: skip
    return compiled, step
