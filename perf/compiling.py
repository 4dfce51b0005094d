"""Compile a plan's kernel for a real target, with no GPU, and read what matters off the result."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from trigru.backward import _gru_backward_kernel
from trigru.forward import _gru_forward_kernel
from trigru.launch import compile_options, compile_time
from trigru.plan import DeviceLimits, LaunchPlan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# SMs and the shared memory that one program can have, from the CUDA programming guide's table of
# technical specifications and the vendor's data sheets.
TARGETS = {
    80: DeviceLimits("A100 (sm_80)", (8, 0), 108, 163 * 1024),
    86: DeviceLimits("RTX 3090 (sm_86)", (8, 6), 82, 99 * 1024),
    90: DeviceLimits("H100 (sm_90)", (9, 0), 132, 227 * 1024),
    100: DeviceLimits("B200 (sm_100)", (10, 0), 148, 227 * 1024),
    120: DeviceLimits("RTX 5090 (sm_120)", (12, 0), 170, 99 * 1024),
}


class NoDevice:
    """Triton's driver for an sm_90 that is not there: kernels compile, and cannot be launched."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    shared_bytes: int
    registers: int
    ptx: str


def compile_plan(
    sm: int,
    plan: LaunchPlan,
    dtype: torch.dtype,
    *,
    backward: bool,
    textbook: bool,
    tf32: bool = True,
    packed: bool = False,
    resets: bool = False,
) -> Compiled:
    """The kernel as the JIT would compile it for training with this plan."""
    kernel = _gru_backward_kernel if backward else _gru_forward_kernel
    switches = {
        "TEXTBOOK": textbook, "HEADS": 1, "REVERSE": False, "BIDIRECTIONAL": plan.D == 2,
    }  # fmt: skip
    if not backward:
        switches["SAVE"] = True
    absent = {"reset_state_ptr", "dreset_ptr", "scale_ptr", "clip"}
    absent |= set() if packed else {"offsets_ptr"}
    absent |= set() if resets else {"resets_ptr", "before_ptr"}
    absent |= {"b_hh_ptr"} if textbook else set()
    constants = compile_time(plan, dtype == torch.float32 and not tf32, **switches)
    constants |= {name: None for name in kernel.arg_names if name in absent}
    scalars = {"T": "i32", "B": "i32", "rows": "i32", "wait_limit": "i32", "first_direction": "i32"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in scalars:
            signature[name] = scalars[name]
        else:
            pointers = {"error_ptr": "*i32", "offsets_ptr": "*i64", "resets_ptr": "*i32"}
            signature[name] = pointers.get(name, "*" + ELEMENT[dtype])
            if not kernel.params[i].do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": plan.num_warps, **compile_options()}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run_tool("cuobjdump", "-res-usage", cubin.name)
    registers = re.findall(r"REG:(\d+)", usage)[-1]
    return Compiled(
        compiled.asm["cubin"], compiled.metadata.shared, int(registers), compiled.asm["ptx"]
    )


def run_tool(tool: str, *args: str) -> str:
    """What one of the binary tools of Triton's wheel prints."""
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout
