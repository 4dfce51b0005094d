"""What `python -m trigru` says."""

import pytest
import torch

from perf.compiling import TARGETS
from trigru import __main__ as command
from trigru import ops
from trigru.plan import DeviceLimits, NoPlan, plan_launch


@pytest.fixture
def two_devices(monkeypatch):
    """An H100, and a GPU that is too old, neither of which is there."""
    limits = {0: TARGETS[90], 1: DeviceLimits("V100", (7, 0), 80, 96 * 1024)}
    monkeypatch.setattr(ops, "device_limits", lambda device: limits[device.index])
    ops.plan_for.cache_clear()
    ops._why_no_plan.cache_clear()
    yield
    ops.plan_for.cache_clear()
    ops._why_no_plan.cache_clear()


def test_the_path_that_runs_is_the_one_that_is_said(two_devices, capsys):
    command.describe_paths(torch.device("cuda", 0))
    said = capsys.readouterr().out
    assert "H=512 B=1 forward: groups of" in said and "cuDNN, as" not in said
    assert said.count("H=4096 B=16: ATen's GRU, without cuDNN: U with hidden size 4096") == 2
    assert said.count("H=4096 B=16: the reference: U with hidden size 4096") == 2
    command.describe_paths(torch.device("cuda", 1))
    said = capsys.readouterr().out
    assert said.count("without cuDNN: V100 has compute capability 7.0") == 2 * len(command.SHAPES)
    assert "forward" not in said and "backward" not in said


@pytest.mark.parametrize("off", [1.0, 1.001])
def test_one_wrong_result_is_a_failure(monkeypatch, capsys, off):
    computed = command.computed

    def planted(inputs, cotangents, textbook):
        results = computed(inputs, cotangents, textbook)
        return results | {"dh0": results["dh0"] * off} if textbook else results

    monkeypatch.setattr(command, "computed", planted)
    monkeypatch.setattr(command, "PROBLEMS", ((4, 2, 1, 8), (3, 2, 2, 6)))
    assert command.main() == (0 if off == 1 else 1)
    said = capsys.readouterr().out
    assert said.count("dh0: relative error") == (0 if off == 1 else 2)
    assert said.endswith("passed\n" if off == 1 else "FAILED\n")


def test_exact_float32_alone_does_without_a_kernel_where_it_has_no_plan(two_devices, monkeypatch):
    """It takes more than TF32, which is what PyTorch lets recurrent layers compute in."""
    device, H = torch.device("cuda", 0), 1152
    which = {"B": 1, "H": H, "D": 1, "itemsize": 4, "backward": True, "textbook": False}
    with pytest.raises(NoPlan):
        plan_launch(TARGETS[90], exact=True, **which)
    for precision, has_kernel in (("tf32", True), ("ieee", False), ("tf32", True)):
        monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
        reason = ops.why_no_kernel(device, torch.float32, H, False)
        assert (reason is None) == has_kernel, reason
