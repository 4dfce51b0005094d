"""Compile the kernels of a few plans with the Triton that is installed: Gluon is experimental, and
a name that it changes shows here first."""

from itertools import product

import torch
import triton

from perf.compiling import TARGETS, compile_plan
from perf.sass import disassemble, find_loop, parse, spills
from trigru.plan import plan_launch

PLANS = ((90, 64, 16), (90, 512, 16), (90, 256, 4096), (80, 100, 64))  # sm, H, B

for sm, H, B in PLANS:
    passes = (False, False), (True, True)
    for (backward, textbook), resets in product(passes, (False, True)):
        which = {"backward": backward, "textbook": textbook}
        plan = plan_launch(TARGETS[sm], B=B, H=H, D=1, itemsize=2, **which)
        which["resets"] = resets
        compiled = compile_plan(sm, plan, torch.bfloat16, **which)
        assert compiled.shared_bytes <= plan.shared_bytes, plan
        loop = find_loop(*parse(disassemble(compiled.cubin)))
        print(
            f"Triton {triton.__version__}: sm_{sm} H={H} B={B} {plan.regime} {which}: "
            f"{compiled.registers} registers, {spills(loop)} spills in the time loop",
            flush=True,
        )
