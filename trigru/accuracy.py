"""The one tolerance rule, for the tests, the self-test and the benchmarks alike.

A result may be twice as far from the float64 result as PyTorch's own is in the same dtype on the
same device (nn.GRU's; for the textbook form, that of an eager loop), plus one rounding of the
dtype. Distances are the largest over a tensor, relative to the largest exact value.
"""

import torch
from torch import Tensor

FACTOR = 2.0


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """The largest |actual − exact| over the largest |exact|; inf where `actual` is not finite or
    has another shape."""
    if actual.shape != exact.shape or not actual.isfinite().all():
        return float("inf")
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    difference = (actual.to(exact) - exact).abs().max().item()
    return difference / max(exact.abs().max().item(), torch.finfo(torch.float64).tiny)


def allowed_error(yardstick: Tensor, exact: Tensor) -> float:
    """The largest relative error that a result in `yardstick`'s dtype may have."""
    return FACTOR * relative_error(yardstick, exact) + torch.finfo(yardstick.dtype).eps
