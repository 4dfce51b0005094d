"""The tolerance rule itself: what it allows, and whose results it is measured by."""

import pytest
import torch

from trigru import accuracy

CUDA = torch.device("cuda")
PRODUCTS = pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "ieee"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_rule_holds_for_no_result_without_a_yardstick(bad):
    """A yardstick that is not finite allows nothing, least of all its own kind."""
    exact = {"y": torch.ones(3).double()}
    good, useless = {"y": torch.ones(3)}, {"y": torch.tensor([1.0, bad, 1.0])}
    assert not accuracy.violations(good, exact, good)
    for actual in (good, useless):
        assert accuracy.violations(actual, exact, useless)
    assert accuracy.violations(useless, exact, good)


@PRODUCTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_floor_is_one_rounding_of_the_products(monkeypatch, dtype, tf32):
    """PyTorch's products may be exact where ours are of TF32; in full float32 nothing is eased."""
    monkeypatch.setattr(accuracy, "uses_tf32", lambda device: tf32)
    exact = torch.ones(3, dtype=torch.float64)
    floor = accuracy.allowed_error(exact.to(dtype), exact)
    if dtype == torch.float32:
        assert floor == (2.0**-10 if tf32 else 4 * 2.0**-23)
    else:
        assert floor == torch.finfo(dtype).eps
    for off, allowed in ((0.5 * floor, True), (4 * floor, False)):
        broken = accuracy.violations({"y": exact + off}, {"y": exact}, {"y": exact.to(dtype)})
        assert allowed == (not broken)


class Refused:
    """A call that raises as long as cuDNN is on."""

    def __init__(self, error):
        self.error = error

    def __call__(self):
        if torch._C._get_cudnn_enabled():
            raise self.error
        return "ATen's"


REFUSAL = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\nsecond line")


def test_what_cudnn_refuses_is_computed_without_it():
    assert accuracy.unless_cudnn_refuses(lambda: "cuDNN's", CUDA) == ("cuDNN's", "")
    result = accuracy.unless_cudnn_refuses(Refused(REFUSAL), CUDA)
    assert result == ("ATen's", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
    assert torch._C._get_cudnn_enabled()


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("full"), CUDA),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), CUDA),
        (REFUSAL, torch.device("cpu")),
        (KeyError(1), CUDA),
    ],
    ids=["memory", "cuDNN's memory", "cpu", "another error"],
)
def test_no_other_error_is_taken_for_a_refusal(error, device):
    with pytest.raises(type(error)):
        accuracy.unless_cudnn_refuses(Refused(error), device)


def test_a_yardstick_without_cudnn_says_so(monkeypatch):
    inputs, cotangents = accuracy.problem(2, 3, 1, 4, textbook=False, dtype=torch.float32)
    expected = accuracy.yardsticks(inputs, cotangents, textbook=False)

    def refused(call, device):
        return call(), "no such kernel"

    monkeypatch.setattr(accuracy, "unless_cudnn_refuses", refused)
    with pytest.warns(UserWarning, match="PyTorch's without cuDNN: no such kernel"):
        actual = accuracy.yardsticks(inputs, cotangents, textbook=False)
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in actual[1])
