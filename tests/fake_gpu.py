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


def in_float32(reference):
    def computed(*tensors, **switches):
        def widened(tensor):
            return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor

        results = reference(*map(widened, tensors), **switches)
        return tuple(result.to(tensors[0].dtype) for result in results)

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
        forward.gru_forward = ahead.then(forward.gru_forward, in_float32(reference.gru_forward))
        backward.gru_backward = ahead.then(
            backward.gru_backward, in_float32(reference.gru_backward)
        )


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
