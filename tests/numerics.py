"""Shared by the numeric tests: random problems, their gradients, and the tolerance rule applied."""

import torch
from torch import Tensor

from trigru import reference
from trigru.accuracy import allowed_error, relative_error

NAMES = ("y", "h_n", "dgx", "dh0", "dw_hh", "db_hh")


def problem(
    T: int, B: int, D: int, H: int, *, textbook: bool, dtype: torch.dtype
) -> tuple[dict, dict]:
    """Random inputs of a recurrence (all directions at once) and random dy and dh_n."""
    scale = H**-0.5
    inputs = {
        "gx": torch.randn(T, B, D, 3 * H),
        "h0": torch.randn(D, B, H),
        "w_hh": torch.empty(D, 3 * H, H).uniform_(-scale, scale),
        "b_hh": None if textbook else torch.empty(D, 3 * H).uniform_(-scale, scale),
    }
    cotangents = {"dy": torch.randn(T, B, D, H), "dh_n": torch.randn(D, B, H)}
    inputs = {k: None if v is None else v.to(dtype) for k, v in inputs.items()}
    return inputs, {k: v.to(dtype) for k, v in cotangents.items()}


def cast(tensors: dict, dtype: torch.dtype) -> dict:
    return {k: None if v is None else v.to(dtype) for k, v in tensors.items()}


def differentiate(function, inputs: dict, cotangents: dict) -> dict[str, Tensor]:
    """y, h_n and all gradients of `function(**inputs) -> (y, h_n)`, by autograd, by name."""
    leaves = {
        k: None if v is None else v.detach().clone().requires_grad_() for k, v in inputs.items()
    }
    y, h_n = function(**leaves)
    wanted = [v for v in leaves.values() if v is not None]
    grads = torch.autograd.grad((y, h_n), wanted, (cotangents["dy"], cotangents["dh_n"]))
    return dict(zip(NAMES, (y.detach(), h_n.detach(), *grads), strict=False))


def eager_loop(*, textbook: bool, reverse: bool):
    """The reference's forward loop as a function of the inputs, for `differentiate`."""

    def function(gx, h0, w_hh, b_hh):
        y, h_n, _, _ = reference.gru_forward(gx, h0, w_hh, b_hh, textbook=textbook, reverse=reverse)
        return y, h_n

    return function


def nn_gru(*, reverse: bool):
    """torch.nn.GRU's function of the same inputs: its input projection is the identity."""

    def function(gx, h0, w_hh, b_hh):
        D, H3 = gx.shape[2:]
        y, h_n = [], []
        for d in range(D):
            flip = (lambda t: t.flip(0)) if reverse or d == 1 else (lambda t: t)
            weights = [torch.eye(H3, dtype=gx.dtype, device=gx.device), w_hh[d]]
            if b_hh is not None:
                weights += [torch.zeros_like(b_hh[d]), b_hh[d]]
            layer = (b_hh is not None, 1, 0.0, True, False, False)
            y_d, h_d = torch.gru(flip(gx[:, :, d]).contiguous(), h0[d : d + 1], weights, *layer)
            y.append(flip(y_d))
            h_n.append(h_d[0])
        return torch.stack(y, 2), torch.stack(h_n)

    return function


def yardsticks(
    inputs: dict, cotangents: dict, *, textbook: bool, reverse: bool
) -> tuple[dict, dict]:
    """What the rule needs: the float64 results, and PyTorch's own in the inputs' dtype."""
    double, double_cotangents = cast(inputs, torch.float64), cast(cotangents, torch.float64)
    loop = eager_loop(textbook=textbook, reverse=reverse)
    exact = differentiate(loop, double, double_cotangents)
    pytorch = loop if textbook else nn_gru(reverse=reverse)
    return exact, differentiate(pytorch, inputs, cotangents)


def assert_within_rule(actual: dict, exact: dict, yardstick: dict) -> None:
    """Every result of `actual` obeys the tolerance rule; the message lists all that do not."""
    assert actual.keys() == exact.keys() == yardstick.keys()
    wrong = []
    for name in actual:
        assert actual[name].dtype == yardstick[name].dtype, name
        error = relative_error(actual[name], exact[name])
        allowed = allowed_error(yardstick[name], exact[name])
        if not error <= allowed:
            wrong.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    assert not wrong, "; ".join(wrong)
