"""A plugin of pytest under which GPU tests run without a GPU: on the CPU, where launches compile
for an H100 that is not there, and the reference in float32 computes what they would have. Only
tests that ask nothing else of torch.cuda can run so. It says how many kernels Triton has cached."""

from pathlib import Path

import pytest
import torch
import triton

torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda *_: None
torch.cuda.current_device = lambda: 0
torch.set_num_threads(1)


def in_float32(reference, like, state):
    """The reference. like: which of its tensors has its results' dtype, gx or y; state: where h0
    is among them, and among the results what has h0's dtype."""
    from trigru.launch import rounded

    def widened(value):
        wide = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.float() if wide else value

    def computed(*tensors, clip=None, **switches):
        dtype = tensors[like].dtype
        switches = {name: widened(value) for name, value in switches.items()}
        results = reference(*map(widened, tensors), clip=rounded(clip, dtype), **switches)
        return tuple(
            result.to(tensors[state].dtype if i == state else dtype)
            for i, result in enumerate(results)
        )

    return computed


def pytest_configure():
    from compile_only import folder

    from perf import ahead
    from perf.compiling import TARGETS, NoDevice
    from trigru import backward, forward, ops, reference

    triton.runtime.driver._active = NoDevice()
    ops.device_limits = lambda device: TARGETS[90]
    ops.why_no_kernel = lambda device, dtype, H, textbook: (
        None if dtype in ops._KERNEL_DTYPES else "no such kernel"
    )
    if folder() is None:  # where launches are meant
        ahead.compile_only()
        there, back = reference.gru_forward, reference.gru_backward
        forward.gru_forward = ahead.then(forward.gru_forward, in_float32(there, 0, 1))
        backward.gru_backward = ahead.then(backward.gru_backward, in_float32(back, 4, 2))


def pytest_collection_modifyitems(items):
    for item in items:
        item.module.DEVICE = "cpu"


def kernels():
    return len(list(Path(triton.knobs.cache.dir).rglob("*.cubin")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    print("kernels before:", kernels())


def pytest_sessionfinish():
    print("kernels after:", kernels())
