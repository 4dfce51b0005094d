"""One case to compute: its numbers, its exact results, and whether a provider's are right."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from trigru.accuracy import is_refusal, relative_error, violations

from .measure import Call, reason
from .providers import DTYPES, Provider, Weights, build_eager, build_torch, without_cudnn
from .shapes import Case

Results = dict[str, Tensor]  # y, h_n, dx, dh0 and the gradients of the weights, by name

# A yardstick further off than this part of the largest exact value measures nothing.
USELESS_YARDSTICK = 0.25


class Problem(NamedTuple):
    """What a case computes from, all in one dtype, and the gradients that arrive at its results."""

    weights: Weights
    x: Tensor  # (T, B, I), or packed (N, I), a row for every step of every sequence
    h0: Tensor  # (layers · directions, B, H)
    dy: Tensor  # (T, B, directions · H) or (N, directions · H)
    dh_n: Tensor  # as h0
    batch_sizes: Tensor | None = None  # (T,), on the host: how many sequences have each step


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

    batch_sizes = None
    shape: tuple[int, ...] = case.T, case.B
    if case.packed:
        lengths = torch.tensor(case.lengths())
        batch_sizes = (lengths > torch.arange(case.T)[:, None]).sum(1)
        shape = (int(lengths.sum()),)
    return Problem(
        weights,
        x=normal(*shape, case.I),
        h0=normal(case.layers * D, case.B, case.H).tanh(),
        dy=normal(*shape, D * case.H),
        dh_n=normal(case.layers * D, case.B, case.H),
        batch_sizes=batch_sizes,
    )


def exact_results(case: Case, problem: Problem) -> Results:
    """The results of training in float64, of nn.GRU or the eager loop: y, h_n, dx, dh0 and the
    gradient of each weight, by name and in the order of `make_call`."""
    weights = {name: w.double() for name, w in problem.weights.items()}
    tensors = {name: getattr(problem, name).double() for name in ("x", "h0", "dy", "dh_n")}
    double = problem._replace(weights=weights, **tensors)
    build = build_torch if case.variant == "torch" else build_eager
    names = ("y", "h_n", "dx", "dh0", *(f"d{name}" for name in weights))
    _, results, _ = first_call(build(case, weights, True), double, "training")
    return dict(zip(names, results, strict=True))


def first_call(
    provider: Provider, problem: Problem, mode: str
) -> tuple[Call, Sequence[Tensor], str]:
    """What is timed, its results, and a remark if cuDNN refuses the case: then it is off whenever
    this is called."""
    call = make_call(provider, problem, mode)
    try:
        return call, call(), ""
    except RuntimeError as error:
        if not provider.cudnn or not is_refusal(error):
            raise
        remark = f"without cuDNN: {reason(error)}"
    call = make_call(without_cudnn(provider), problem, mode)
    return call, call(), remark


def make_call(provider: Provider, problem: Problem, mode: str) -> Call:
    """What is timed. In the forward mode the layer without gradients; in training the layer, then
    the gradients of its input, its initial state and all its weights."""

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        if problem.batch_sizes is None:
            return provider.layer(x, h0)
        y, h_n = provider.layer(PackedSequence(x, problem.batch_sizes), h0)
        return y.data, h_n

    if mode == "forward":

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return layer(problem.x, problem.h0)

        return forward

    x, h0 = (t.detach().requires_grad_() for t in (problem.x, problem.h0))

    def training() -> Sequence[Tensor]:
        y, h_n = layer(x, h0)
        arriving = (problem.dy, problem.dh_n)
        gradients = torch.autograd.grad((y, h_n), (x, h0, *provider.parameters), arriving)
        return y.detach(), h_n.detach(), *gradients

    return training
