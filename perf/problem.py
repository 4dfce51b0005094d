"""One case to compute: its numbers, its exact results, and whether a provider's are right."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trigru.accuracy import relative_error, violations

from .providers import DTYPES, Provider, Weights, build_eager, build_torch
from .shapes import Case

Results = dict[str, Tensor]  # y, h_n, dx, dh0 and the gradients of the weights, by name

# A yardstick further off than this part of the largest exact value measures nothing.
USELESS_YARDSTICK = 0.25


class Problem(NamedTuple):
    """What a case computes from, all in one dtype, and the gradients that arrive at its results."""

    weights: Weights
    x: Tensor  # (T, B, I)
    h0: Tensor  # (layers · directions, B, H)
    dy: Tensor  # (T, B, directions · H)
    dh_n: Tensor  # as h0


def judge(results: Results, exact: Results, yardstick: Results | None) -> tuple[float, str]:
    """The largest relative error of the results, and "ok" or what is wrong with them.

    trigru.accuracy's rule, or without a yardstick, as for the yardstick itself, that they are of
    any use as one."""
    worst = max(relative_error(results[name], exact[name]) for name in exact)
    if yardstick is None:
        useful = worst <= USELESS_YARDSTICK
        return worst, "ok" if useful else f"wrong: relative error {worst:.2e}, of no use"
    broken = violations(results, exact, yardstick)
    broken += [
        f"{name} is {results[name].dtype}, not {yardstick[name].dtype}"
        for name in exact
        if results[name].dtype != yardstick[name].dtype
    ]
    return worst, f"wrong: {'; '.join(broken)}" if broken else "ok"


def make_problem(case: Case, device: torch.device) -> Problem:
    """The same random numbers for the same case: nn.GRU's initial weights, inputs and gradients of
    unit variance, a state between -1 and 1."""
    torch.manual_seed(0)
    dtype, D = DTYPES[case.dtype], case.directions
    layer = torch.nn.GRU(
        case.I, case.H, case.layers, bidirectional=D == 2, device=device, dtype=dtype
    )
    bias_hh = () if case.variant == "torch" else ("bias_hh",)
    weights = {k: v.detach() for k, v in layer.named_parameters() if not k.startswith(bias_hh)}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return Problem(
        weights,
        x=normal(case.T, case.B, case.I),
        h0=normal(case.layers * D, case.B, case.H).tanh(),
        dy=normal(case.T, case.B, D * case.H),
        dh_n=normal(case.layers * D, case.B, case.H),
    )


def exact_results(case: Case, problem: Problem) -> Results:
    """The results of training in float64, of nn.GRU or the eager loop: y, h_n, dx, dh0 and the
    gradient of each weight, by name and in the order of `make_call`."""
    weights = {name: w.double() for name, w in problem.weights.items()}
    double = Problem(weights, *(t.double() for t in problem[1:]))
    build = build_torch if case.variant == "torch" else build_eager
    names = ("y", "h_n", "dx", "dh0", *(f"d{name}" for name in weights))
    results = make_call(build(case, weights, True), double, "training")()
    return dict(zip(names, results, strict=True))


def make_call(provider: Provider, problem: Problem, mode: str) -> Callable[[], Sequence[Tensor]]:
    """What is timed. In the forward mode the layer without gradients; in training the layer, then
    the gradients of its input, its initial state and all its weights."""
    if mode == "forward":

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return provider.layer(problem.x, problem.h0)

        return forward

    x, h0 = (t.detach().requires_grad_() for t in (problem.x, problem.h0))

    def training() -> Sequence[Tensor]:
        y, h_n = provider.layer(x, h0)
        arriving = (problem.dy, problem.dh_n)
        gradients = torch.autograd.grad((y, h_n), (x, h0, *provider.parameters), arriving)
        return y.detach(), h_n.detach(), *gradients

    return training
