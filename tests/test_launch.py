"""What surrounds a launch: the error flags and Triton's options."""

import subprocess
import sys
import threading

import pytest
import torch
from triton.backends.nvidia.compiler import CUDAOptions

import trigru
from perf.compiling import TARGETS
from trigru import launch
from trigru.plan import plan_launch

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two CUDA devices, of which the second is the current one, each with a flag."""
    flags = {device: torch.zeros(1, dtype=torch.int32) for device in (CPU, FIRST, SECOND)}
    monkeypatch.setattr(launch, "_error_flags", flags)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return flags


@pytest.mark.parametrize(
    ("failed", "named", "others"),
    [
        (SECOND, ("cuda", "cuda:1", SECOND, torch.device("cuda")), ("cuda:0", FIRST, "cpu")),
        (FIRST, ("cuda:0", FIRST), ("cuda", SECOND, "cpu")),
        (CPU, ("cpu", CPU), ("cuda", FIRST)),
    ],
    ids=str,
)
def test_every_name_of_a_device_means_its_own_flag(two_gpus, failed, named, others):
    for name in named:
        two_gpus[failed].fill_(1)
        for other in others:
            trigru.raise_if_failed(other)
        with pytest.raises(trigru.ExchangeTimeout, match=str(failed)):
            trigru.raise_if_failed(name)
        trigru.raise_if_failed(name)  # the flag is down again


def test_what_is_no_device_is_refused_and_what_never_launched_has_not_failed(two_gpus):
    with pytest.raises(RuntimeError, match="device type"):
        trigru.raise_if_failed("gpu")
    trigru.raise_if_failed("cuda:7")
    assert torch.device("cuda:7") not in two_gpus


def test_threads_get_one_flag(monkeypatch):
    """Or a wait of one launch would raise a flag that nobody looks at."""
    monkeypatch.setattr(launch, "_error_flags", {})
    zeros, ready = torch.zeros, threading.Barrier(4)

    def slow(*args, **kwargs):
        all_made.wait(0.2)
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", slow)
    all_made, flags = threading.Event(), []

    def ask():
        ready.wait()
        flags.append(launch.error_flag(CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(flags) == 4 and all(flag is flags[0] for flag in flags)


def test_a_launch_asks_for_fused_multiplications(monkeypatch):
    """Where Triton knows the option, which else it would one day take for off."""
    asked = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: asked.append(kwargs)

    plan = plan_launch(TARGETS[90], B=3, H=32, D=1, itemsize=4, backward=False, textbook=False)
    gx = torch.zeros(5, 3)
    launch.launch(Kernel(), (gx,), gx, None, (5, 3), 3, plan)
    assert asked[0]["enable_fp_fusion"] is True and asked[0]["num_stages"] == 1
    monkeypatch.delattr(CUDAOptions, "enable_fp_fusion")
    assert launch.compile_options.__wrapped__() == {"num_stages": 1}


def test_products_are_exact_where_float32_is_not_rounded_to_tf32(monkeypatch):
    assert launch.is_exact(torch.float32, CPU) and not launch.is_exact(torch.bfloat16, CPU)
    monkeypatch.setattr(launch, "uses_tf32", lambda device: True)
    assert not launch.is_exact(torch.float32, CPU)


@pytest.mark.parametrize(
    "gone", ["gl.thread_barrier", "gl.NVMMADistributedLayout", "gluon.constexpr_function"]
)
def test_a_triton_of_other_names_leaves_the_library_without_kernels(gone):
    """Gluon is experimental; all names that the kernels use are looked up at the import."""
    code = f"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
gl.barrier = None
del {gone}
import torch, trigru
print(trigru.ops.WITHOUT_KERNELS)
print(trigru.TriGRU(3, 4)(torch.zeros(2, 1, 3))[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, shape = done.stdout.splitlines()
    assert reason.startswith("the kernels do not go with the Triton")
    assert gone.split(".")[1] in reason
    assert shape == "torch.Size([2, 1, 4])"
