"""`python -m perf regret`: how far the plans that are chosen lie behind the best ones, by a MODEL.

trigru/plan.py chooses by a formula. Here every candidate's kernel is compiled and its time loop
read by perf.sass, which takes seconds each, and the choice is judged by that: the same model as of
`perf static`; nothing is measured. What has been estimated is kept in a CSV file and not estimated
again while the kernels and perf.sass are the same.
"""

import csv
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import trigru
from trigru.plan import LaunchPlan, candidates, plan_launch

from . import sass
from .compiling import TARGETS
from .measure import append_row
from .progress import tqdm
from .shapes import VARIANTS
from .static import DEVICES, KIND, estimated

SM = 90
# Modules that decide what runs.
KERNELS = ("exchange", "form", "tiles", "products", "forward", "backward")
HIDDEN = (64, 128, 200, 256, 384, 512, 768, 1024, 1536, 2048)
BATCH = (1, 16, 64, 256, 1024, 4096)

KERNEL_COLUMNS = (
    "hash", "sm", "dtype", "variant", "pass", "H", "H_pad", "BLOCK_H", "BLOCK_B", "warps", "split",
    "solo", "chunks", "stages", "u_shared", "wgmma",
)  # fmt: skip
CLOCKS_COLUMNS = (
    *KERNEL_COLUMNS, "rows", "clocks", "clocks_low", "clocks_high", "spills", "registers",
    "shared_bytes", "barriers", "instructions",
)  # fmt: skip
COLUMNS = (
    "kind", "sm", "dtype", "variant", "pass", "H", "B", "chosen", "best", "us_chosen", "us_best",
    "regret",
)  # fmt: skip
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@functools.cache
def code_hash() -> str:
    """Of all that decides an estimate: the kernels' sources and the model's."""
    folder = Path(trigru.__file__).parent
    sources = [folder / f"{name}.py" for name in KERNELS]
    digest = hashlib.sha256()
    for path in (*sources, Path(sass.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def identity(
    sm: int, dtype: torch.dtype, plan: LaunchPlan, backward: bool, textbook: bool
) -> dict[str, str]:
    """What names a kernel in the file of estimates."""
    values = (
        code_hash(), sm, DTYPES[dtype], VARIANTS[textbook], "backward" if backward else "forward",
        plan.H, plan.H_pad, plan.BLOCK_H, plan.BLOCK_B, plan.num_warps, plan.split, plan.solo,
        plan.chunks, plan.stages, plan.u_shared, plan.wgmma,
    )  # fmt: skip
    return dict(zip(KERNEL_COLUMNS, map(str, values), strict=True))


class Estimates:
    """What has been estimated, in a file that keeps every row as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self.rows[self._key(row)] = row

    @staticmethod
    def _key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in (*KERNEL_COLUMNS, "rows"))

    def of(
        self, sm: int, dtype: torch.dtype, plan: LaunchPlan, backward: bool, textbook: bool
    ) -> dict[str, str]:
        """The row of a plan's kernel, with its tile taken as full, or as a quarter full."""
        rows = plan.BLOCK_B // 4 if plan.rows <= plan.BLOCK_B // 4 else plan.BLOCK_B
        named = identity(sm, dtype, plan, backward, textbook) | {"rows": str(rows)}
        key = self._key(named)
        if key not in self.rows:
            alike = replace(plan, rows=rows, directions=1, batch_programs=1)
            compiled, step = estimated(sm, alike, backward, textbook, dtype)
            self.rows[key] = named | {
                "clocks": str(round(step.clocks)), "clocks_low": str(round(step.low)),
                "clocks_high": str(round(step.high)), "spills": f"{step.spills:g}",
                "registers": str(compiled.registers), "shared_bytes": str(compiled.shared_bytes),
                "barriers": f"{step.barriers:g}",
                "instructions": str(round(sum(step.issued.values()))),
            }  # fmt: skip
            append_row(self.path, CLOCKS_COLUMNS, self.rows[key])
        return self.rows[key]


def regret_rows(estimates: Estimates, dtype: torch.dtype = torch.bfloat16) -> Iterator[dict]:
    """The table, row by row."""
    cases = list(product(VARIANTS, HIDDEN, (False, True)))
    for variant, H, backward in tqdm(cases, desc="regret"):
        for B in BATCH:
            yield row_of(estimates, dtype, variant, H, B, backward)


def row_of(
    estimates: Estimates, dtype: torch.dtype, variant: str, H: int, B: int, backward: bool
) -> dict[str, Any]:
    """One shape's plan, and the best one."""
    textbook = variant == "textbook"
    shape: dict[str, Any] = {"B": B, "H": H, "D": 1, "itemsize": dtype.itemsize}
    shape |= {"backward": backward, "textbook": textbook}
    chosen = plan_launch(TARGETS[SM], **shape)

    def clocks(plan: LaunchPlan) -> float:
        return plan.rounds(B) * float(estimates.of(SM, dtype, plan, backward, textbook)["clocks"])

    best = min(candidates(TARGETS[SM], **shape), key=clocks)
    mhz = DEVICES[SM].mhz
    return {
        "kind": KIND, "sm": SM, "dtype": DTYPES[dtype], "variant": variant,
        "pass": "backward" if backward else "forward", "H": H, "B": B, "chosen": tile(chosen),
        "best": tile(best), "us_chosen": f"{clocks(chosen) / mhz:.3f}",
        "us_best": f"{clocks(best) / mhz:.3f}",
        "regret": f"{clocks(chosen) / clocks(best) - 1:.3f}",
    }  # fmt: skip


def tile(plan: LaunchPlan) -> str:
    """A plan in a word."""
    return f"{plan.regime} {plan.BLOCK_H}x{plan.BLOCK_B} by {plan.num_warps}"


def write_regret(path: Path) -> str:
    """Write the table anew, and say what it comes to."""
    path.unlink(missing_ok=True)
    regrets = []
    for row in regret_rows(Estimates(path.with_name("clocks.csv"))):
        append_row(path, COLUMNS, row)
        regrets.append(row)
    worst = sorted(regrets, key=lambda row: float(row["regret"]))[-3:]
    mean = sum(float(row["regret"]) for row in regrets) / len(regrets)
    lines = [f"{len(regrets)} shapes, {KIND}: chosen plans are {100 * mean:.1f} % behind the best"]
    for row in reversed(worst):
        lines += [
            f"{100 * float(row['regret']):.0f} %: {row['variant']} {row['pass']} H={row['H']} "
            f"B={row['B']}, {row['chosen']}, not {row['best']}"
        ]
    return "\n".join(lines)
