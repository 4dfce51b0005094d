"""Layers and calls at random, all that nn.GRU accepts: TriGRU beside nn.GRU, and its textbook form
beside a loop by hand. On a CPU in float64, on a GPU in the dtypes that have kernels.

FUZZ=1000 pytest tests/test_fuzz.py looks at as many cases, others in every run."""

import os
import random
from dataclasses import dataclass
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
from layers import (
    BF16,
    F64,
    FP16,
    FP32,
    assert_all_within_rule,
    assert_same_packing,
    believing_in_kernels,
    data_of,
    expected,
    in_double,
)
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close

from trigru import TriGRU, ops
from trigru.accuracy import products_as_in_rnns, relative_error, unless_cudnn_refuses

try:
    import hypothesis
    from hypothesis import strategies
except ImportError:  # as on machines that are there for what needs a GPU
    hypothesis = None

EXAMPLES = int(os.environ.get("FUZZ", 200))


@dataclass(frozen=True)
class Case:
    """A layer, a call, and what is differentiated of it. Dense: (T, B); packed: the lengths."""

    form: str
    settings: dict
    training: bool
    layout: str
    T: int
    B: int
    lengths: tuple
    x: str
    hx: str
    trained: str
    used: str
    order: int
    seed: int


FORMS = ("aten", "ops", "textbook")  # as in test_contract
LAYOUTS = ("batched", "unbatched", "sorted", "shuffled")
VIEWS = {  # the shape of what is stored, and the view of it that has the shape
    "plain": lambda shape: (shape, lambda t: t),
    "transposed": lambda shape: ((shape[1], shape[0], *shape[2:]), lambda t: t.transpose(0, 1)),
    "last first": lambda shape: ((shape[-1], *shape[:-1]), lambda t: t.movedim(0, -1)),
    "every second": lambda shape: ((*shape, 2), lambda t: t[..., 1]),
    "part of more": lambda shape: ((*shape[:-1], shape[-1] + 2), lambda t: t[..., 1:-1]),
    "one for all of dim 0": lambda shape: ((1, *shape[1:]), lambda t: t.expand(shape)),
    "one for all of dim 1": lambda shape: ((shape[0], 1, *shape[2:]), lambda t: t.expand(shape)),
}
TRAINED = {  # names of leaves
    "everything": lambda name: True,
    "x": lambda name: name == "x",
    "hx": lambda name: name == "hx",
    "weights": lambda name: name not in ("x", "hx"),
    "all but x": lambda name: name != "x",
    "upper layers": lambda name: name not in ("x", "hx") and "_l0" not in name,
    "weight_hh": lambda name: name.startswith("weight_hh"),
    "biases": lambda name: name.startswith("bias"),
    "nothing": lambda name: False,
}
USED = {
    "both": lambda output, h_n: (output, h_n),
    "output": lambda output, h_n: (output,),
    "h_n": lambda output, h_n: (h_n,),
    "last row": lambda output, h_n: (output[-1:],),
    "state of the first layer": lambda output, h_n: (output[:1], h_n[:1]),
}


def draw(pick, **fixed):
    """A case; `pick` chooses one of a sequence."""

    def choose(name, options):
        return fixed[name] if name in fixed else pick(options)

    layout = choose("layout", LAYOUTS)
    B = choose("B", (2, 1, 3, 5, 0) if layout == "batched" else (2, 1, 3, 5))
    packed = layout in ("sorted", "shuffled")
    T = choose("T", range(1, 7))
    lengths = tuple(pick(range(1, T + 1)) for _ in range(B)) if packed else ()
    return Case(
        form=choose("form", FORMS),
        settings={
            "input_size": choose("input_size", range(1, 6)),
            "hidden_size": choose("hidden_size", range(1, 7)),
            "num_layers": choose("num_layers", (1, 2, 3)),
            "bias": pick((True, False)),
            "batch_first": pick((False, True)),
            "dropout": 0.0,
            "bidirectional": choose("bidirectional", (False, True)),
        },
        training=pick((True, False)),
        layout=layout,
        T=T,
        B=B,
        lengths=tuple(sorted(lengths, reverse=True)) if layout == "sorted" else lengths,
        x=pick(tuple(VIEWS)),
        hx=pick(("none", *VIEWS)),
        trained=pick(tuple(TRAINED)),
        used=pick(tuple(USED)),
        order=choose("order", (1, 2)),
        seed=pick(range(100)),
    )


def make_layer(case, dtype, device):
    torch.manual_seed(case.seed)
    variant = "textbook" if case.form == "textbook" else "torch"
    layer = TriGRU(**case.settings, variant=variant, dtype=dtype)
    for name, p in layer.named_parameters():
        p.requires_grad_(TRAINED[case.trained](name))
    return layer.to(device).train(case.training)


def outcome(function, layer, case, dtype):
    """The outputs of `function` and all derivatives that the case asks for, of random numbers of
    `dtype` in the layer's own dtype, and how the output is packed, if it is."""
    generator = torch.Generator().manual_seed(case.seed)
    weight = next(layer.parameters())

    def numbers(shape):
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype).to(weight)

    def leaf(name, view, shape):
        stored, arrange = VIEWS[view](tuple(shape))
        leaves[name] = numbers(stored).requires_grad_(TRAINED[case.trained](name))
        return arrange(leaves[name])

    leaves = {}
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    lead = (case.B, case.T) if layer.batch_first else (case.T, case.B)
    rows = (case.B,)
    if case.layout == "unbatched":
        lead, rows = (case.T,), ()
    if case.lengths:
        zeros = [torch.zeros(n, layer.input_size) for n in case.lengths]
        like = pack_sequence(zeros, enforce_sorted=case.layout == "sorted")
        x = like.to(weight.device)._replace(data=leaf("x", case.x, like.data.shape))
    else:
        x = leaf("x", case.x, (*lead, layer.input_size))
    hx = None
    if case.hx != "none":
        hx = leaf("hx", case.hx, (states, *rows, layer.hidden_size))
    output, h_n = function(x, hx)

    results = {"output": data_of(output).detach(), "h_n": h_n.detach()}
    wanted = {n: t for n, t in (leaves | dict(layer.named_parameters())).items() if t.requires_grad}
    used = USED[case.used](data_of(output), h_n)
    if wanted:
        cotangents = [numbers(each.shape) for each in used]
        grads = torch.autograd.grad(
            used, list(wanted.values()), cotangents, create_graph=case.order == 2,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        results |= {f"d {name}": g.detach() for name, g in zip(wanted, grads, strict=True)}
        squares = [g.square().sum() for g in grads if g.requires_grad]
        if squares:
            seconds = torch.autograd.grad(
                sum(squares), list(wanted.values()), allow_unused=True, materialize_grads=True
            )
            results |= {f"dd {name}": g for name, g in zip(wanted, seconds, strict=True)}
    else:
        assert not any(each.requires_grad for each in used)
    return results, output if isinstance(output, PackedSequence) else None


def check(case):
    layer = make_layer(case, F64, "cpu")
    with mock.patch("trigru.layer.ops", believing_in_kernels() if case.form == "ops" else ops):
        actual, packed = outcome(layer, layer, case, F64)
    exact, exact_packed = outcome(expected(layer), layer, case, F64)
    assert_close(actual, exact)
    if exact_packed is not None:
        assert_same_packing(packed, exact_packed)


def test_float64_on_the_cpu():
    if hypothesis is None:
        for seed in range(EXAMPLES):
            check(draw(random.Random(seed).choice))
        return

    @strategies.composite
    def cases(draw_):
        return draw(lambda options: draw_(strategies.sampled_from(options)))

    hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize="FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )(hypothesis.given(cases())(check))()


# On a GPU: shapes whose kernels are few, all sizes else at random


DEVICE = "cuda"
KERNELS = [  # layouts, hidden_size, bidirectional
    (("batched", "unbatched"), 64, True),
    (("batched",), 300, False),
    (("sorted", "shuffled"), 64, True),
    (("shuffled",), 300, False),
]
GROUPS = list(product((BF16, FP16, FP32), ops.VARIANTS))


def cases_of(dtype, variant):
    """Twelve, three for each kernel. Up to 16 rows are one tile of it."""
    pick = random.Random(f"{dtype} {variant}").choice
    cases = []
    for layouts, H, bidirectional in KERNELS * 3:
        layout = pick(layouts)
        sizes = {"hidden_size": H, "bidirectional": bidirectional, "T": pick(range(1, 13))}
        sizes["B"] = pick((16, 13, 7, 3, 1, 0) if layout == "batched" else (16, 5))
        sizes |= {"input_size": pick((24, 33)), "num_layers": pick((1, 2)), "order": 1}
        cases.append(draw(pick, form=variant, layout=layout, **sizes))
    return cases


def contiguous(function):
    """cuDNN asks for that."""

    def call(x, hx):
        hx = None if hx is None else hx.contiguous()
        if isinstance(x, PackedSequence):
            return function(x._replace(data=x.data.contiguous()), hx)
        return function(x.contiguous(), hx)

    return call


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("dtype, variant", GROUPS, ids=str)
def test_kernels(dtype, variant):
    triples = []
    for case in cases_of(dtype, variant):
        layer = make_layer(case, dtype, DEVICE)
        double = in_double(layer)[0].cpu()
        actual, packed = outcome(layer, layer, case, dtype)
        exact, exact_packed = outcome(expected(double), double, case, dtype)
        exact = {name: t.to(DEVICE) for name, t in exact.items()}
        if exact_packed is not None:
            assert_same_packing(packed.cpu(), exact_packed)
        if case.B == 0:
            assert all(torch.equal(actual[name], exact[name].to(dtype)) for name in exact), case
            continue
        layer.train()  # cuDNN has no gradients in eval mode
        theirs = partial(outcome, contiguous(expected(layer)), layer, case, dtype)
        with products_as_in_rnns():
            (yardstick, _), _ = unless_cudnn_refuses(theirs, torch.device(DEVICE))
        triples.append((actual, exact, yardstick))
        errors = {name: f"{relative_error(actual[name], exact[name]):.1e}" for name in exact}
        print(case, errors)  # seen where the test fails
    assert_all_within_rule(triples)
