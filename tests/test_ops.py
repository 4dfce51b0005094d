"""`gru` and the two custom operators, as they run without a kernel."""

import subprocess
import sys
import warnings

import pytest
import torch
from numerics import assert_within_rule, offsets_of
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from trigru import gru, ops
from trigru.accuracy import differentiate, eager_loop, nn_gru, problem, yardsticks

F64 = torch.float64
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VARIANTS = pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])
FORMS = pytest.mark.parametrize(
    "textbook, bias",
    [(False, True), (False, False), (True, False)],
    ids=["torch", "torch, no bias", "textbook"],
)
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
SHAPES = pytest.mark.parametrize(
    "T, B, H", [(1, 1, 1), (1, 4, 3), (5, 1, 7), (4, 3, 1), (9, 5, 16)], ids=str
)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
LOSSES = {
    "y": lambda y, h_n: y.square().sum(),
    "h_n": lambda y, h_n: h_n.square().sum(),
    "both": lambda y, h_n: y.square().sum() + h_n.sin().sum(),
    "expanded": lambda y, h_n: y.sum(),  # a gradient of stride 0
    "one step": lambda y, h_n: y[1].square().sum(),
}
LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda t: torch.stack((t, t), -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


def functional(*, textbook, reverse=False, layout=lambda t: t):
    """`gru` as a function of one direction's inputs, for `differentiate`."""

    def function(gx, h0, w_hh, b_hh):
        y, h_n = gru(
            layout(gx[:, :, 0]), layout(h0[0]), layout(w_hh[0]), None if b_hh is None else b_hh[0],
            variant="textbook" if textbook else "torch", reverse=reverse,
        )  # fmt: skip
        return y.unsqueeze(2), h_n.unsqueeze(0)

    return function


def recurrence(*, textbook):
    """`ops.recurrence` of both directions, for `differentiate`."""
    return lambda **inputs: ops.recurrence(**inputs, textbook=textbook)


def make_problem(T, B, D, H, *, textbook, bias=True, dtype=F64):
    inputs, cotangents = problem(T, B, D, H, textbook=textbook, dtype=dtype)
    return inputs if bias else inputs | {"b_hh": None}, cotangents


def cast(tensors, dtype):
    return {k: None if v is None else v.to(dtype) for k, v in tensors.items()}


def leaves_of(inputs):
    return {
        k: None if v is None else v.detach().clone().requires_grad_() for k, v in inputs.items()
    }


class Seen(TorchDispatchMode):
    """Remembers the outputs of every call of `trigru::forward`."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function is torch.ops.trigru.forward.default:
            self.calls.append(outputs)
        return outputs


@FORMS
@pytest.mark.parametrize("D, reverse", [(1, True), (2, False)], ids=str)
@pytest.mark.parametrize("save", [True, False], ids=["save", "save nothing"])
def test_opcheck_forward(textbook, bias, D, reverse, save):
    T = 1 if save and D == 2 else 2  # the gradients are traced step by step, which takes long
    inputs, _ = make_problem(T, 3, D, 4, textbook=textbook, bias=bias, dtype=torch.float32)
    tensors = (leaves_of(inputs) if save else inputs).values()
    walk = textbook, reverse, D == 2, 1, None
    torch.library.opcheck(torch.ops.trigru.forward.default, (*tensors, *[None] * 4, *walk, save))


@VARIANTS
def test_opcheck_of_all_that_changes_a_step(textbook):
    """Heads of two directions, resets, their state, update_scale and clip; forwards and back."""
    inputs, cotangents = make_problem(2, 2, 4, 3, textbook=textbook, dtype=torch.float32)
    resets, reset_state = torch.rand(2, 2, 4) < 0.5, torch.randn(4, 3)
    modifiers = None, resets, reset_state, torch.rand(2, 2, 4, 3)
    walk = textbook, False, True, 2, 0.3
    args = *inputs.values(), *modifiers, *walk
    torch.library.opcheck(torch.ops.trigru.forward.default, (*args, False))
    y, _, gates = torch.ops.trigru.forward(*args, True)
    args = *cotangents.values(), inputs["h0"], inputs["w_hh"], y, gates, *modifiers, *walk
    torch.library.opcheck(torch.ops.trigru.backward.default, args)


@VARIANTS
@pytest.mark.parametrize("D, reverse", [(1, False), (1, True), (2, False)], ids=str)
def test_opcheck_backward(textbook, D, reverse):
    inputs, cotangents = make_problem(3, 2, D, 4, textbook=textbook, dtype=torch.float32)
    walk = *[None] * 4, textbook, reverse, D == 2, 1, None
    y, _, gates = torch.ops.trigru.forward(*inputs.values(), *walk, True)
    args = (*cotangents.values(), inputs["h0"], inputs["w_hh"], y, gates, *walk)
    torch.library.opcheck(torch.ops.trigru.backward.default, args)


@SHAPES
@REVERSE
@FORMS
def test_one_direction_in_float64(T, B, H, reverse, textbook, bias):
    inputs, cotangents = make_problem(T, B, 1, H, textbook=textbook, bias=bias)
    exact, pytorch = yardsticks(inputs, cotangents, textbook=textbook, reverse=reverse)
    ours = functional(textbook=textbook, reverse=reverse)
    actual = differentiate(ours, inputs, cotangents)
    assert_close(actual, exact)
    assert_close(actual, pytorch)  # nn.GRU's, in the torch form


@SHAPES
@FORMS
def test_two_directions_in_float64(T, B, H, textbook, bias):
    inputs, cotangents = make_problem(T, B, 2, H, textbook=textbook, bias=bias)
    _, pytorch = yardsticks(inputs, cotangents, textbook=textbook, reverse=False)
    assert_close(differentiate(recurrence(textbook=textbook), inputs, cotangents), pytorch)


# Large enough that a largest error over a tensor is more than luck.
@pytest.mark.parametrize("T, B, H", [(1, 64, 24), (12, 16, 32)], ids=str)
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tolerance_rule(T, B, H, textbook, bias, dtype):
    inputs, cotangents = make_problem(T, B, 1, H, textbook=textbook, bias=bias, dtype=dtype)
    exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook, reverse=False)
    actual = differentiate(functional(textbook=textbook), inputs, cotangents)
    assert_within_rule(actual, exact, yardstick)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"variant": "lstm"}, ValueError, r"variant must be one of .*'lstm'"),
        ({"variant": "textbook", "b_hh": torch.zeros(12)}, ValueError, "add b_hh to gx"),
        ({"gx": torch.zeros(5, 12)}, RuntimeError, r"gx must have shape \(T, B, 3H\).*\(5, 12\)"),
        ({"gx": torch.zeros(5, 2, 13)}, RuntimeError, r"gx must have shape.*\(5, 2, 13\)"),
        ({"gx": torch.zeros(0, 2, 12)}, RuntimeError, r"gx must have shape.*\(0, 2, 12\)"),
        ({"gx": torch.zeros(5, 2, 0)}, RuntimeError, r"gx must have shape.*\(5, 2, 0\)"),
        ({"h0": torch.zeros(1, 2, 4)}, RuntimeError, r"h0 must have shape \(2, 4\).*\(1, 2, 4\)"),
        ({"h0": torch.zeros(3, 4)}, RuntimeError, r"h0 must have shape \(2, 4\).*\(3, 4\)"),
        ({"w_hh": torch.zeros(4, 12)}, RuntimeError, r"w_hh must have shape \(12, 4\).*\(4, 12\)"),
        ({"b_hh": torch.zeros(4)}, RuntimeError, r"b_hh must have shape \(12,\).*\(4,\)"),
        ({"h0": torch.zeros(2, 4, dtype=F64)}, TypeError, "one floating dtype.*float64"),
        ({"w_hh": torch.zeros(12, 4, dtype=torch.half)}, TypeError, "one floating dtype.*float16"),
        ({"b_hh": torch.zeros(12, dtype=F64)}, TypeError, "one floating dtype.*float64"),
        ({"h0": torch.zeros(2, 4, device="meta")}, RuntimeError, "on one device.*meta"),
        ({"b_hh": torch.zeros(12, device="meta")}, RuntimeError, "on one device.*meta"),
    ],
    ids=str,
)
def test_errors(change, error, text):
    arguments = {"gx": torch.zeros(5, 2, 12), "h0": torch.zeros(2, 4), "w_hh": torch.zeros(12, 4)}
    with pytest.raises(error, match=text):
        gru(**arguments | change)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_only_floating_dtypes(dtype):
    tensors = (torch.zeros(shape, dtype=dtype) for shape in [(5, 2, 12), (2, 4), (12, 4)])
    with pytest.raises(TypeError, match=f"one floating dtype.*{dtype}"):
        gru(*tensors)


@FORMS
@REVERSE
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, textbook, bias, reverse):
    inputs, _ = make_problem(4, 3, 1, 5, textbook=textbook, bias=bias)
    gradients = []
    for form in (functional, eager_loop):
        leaves = leaves_of(inputs)
        LOSSES[loss](*form(textbook=textbook, reverse=reverse)(**leaves)).backward()
        gradients.append({k: v.grad for k, v in leaves.items() if v is not None})
    assert_close(*gradients)


@VARIANTS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, textbook):
    inputs, cotangents = make_problem(4, 4, 1, 4, textbook=textbook)
    change = LAYOUTS[layout]
    assert not change(inputs["gx"][:, :, 0]).is_contiguous()
    assert_close(
        differentiate(functional(textbook=textbook, layout=change), inputs, cotangents),
        differentiate(
            functional(textbook=textbook, layout=lambda t: change(t).contiguous()),
            inputs,
            cotangents,
        ),
    )


@FORMS
def test_empty_batch(textbook, bias):
    inputs, cotangents = make_problem(3, 0, 1, 4, textbook=textbook, bias=bias)
    results = differentiate(functional(textbook=textbook), inputs, cotangents)
    assert results["y"].shape == (3, 0, 1, 4) and results["h_n"].shape == (1, 0, 4)
    assert results["dgx"].shape == (3, 0, 1, 12) and results["dh0"].shape == (1, 0, 4)
    for name in set(results) & {"dw_hh", "db_hh"}:
        assert torch.equal(results[name], torch.zeros_like(results[name])), name


def derivatives(function, inputs, order):
    """All gradients of the order-th derivative, each order's contracted with fixed weights."""
    leaves = leaves_of(inputs)
    wanted = [v for v in leaves.values() if v is not None]
    tensors = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    for k in range(order):
        weights = [torch.randn(t.shape, dtype=F64, generator=generator) for t in tensors]
        value = sum((w * t.square()).sum() for w, t in zip(weights, tensors, strict=True))
        tensors = torch.autograd.grad(value, wanted, create_graph=k + 1 < order)
    return tensors


@FORMS
@pytest.mark.parametrize("D, reverse", [(1, False), (1, True), (2, False)], ids=str)
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives(order, D, reverse, textbook, bias):
    inputs, _ = make_problem(3, 2, D, 3, textbook=textbook, bias=bias)
    ours = (
        recurrence(textbook=textbook) if D == 2 else functional(textbook=textbook, reverse=reverse)
    )
    loop = eager_loop(textbook=textbook, reverse=reverse)
    assert_close(derivatives(ours, inputs, order), derivatives(loop, inputs, order))


@VARIANTS
@pytest.mark.parametrize("output", [0, 1], ids=["y", "h_n"])
def test_second_derivative_through_one_output(output, textbook):
    inputs, _ = make_problem(3, 2, 1, 3, textbook=textbook)
    ours, loop = functional(textbook=textbook), eager_loop(textbook=textbook, reverse=False)
    assert_close(
        derivatives(lambda **leaves: ours(**leaves)[output : output + 1], inputs, 2),
        derivatives(lambda **leaves: loop(**leaves)[output : output + 1], inputs, 2),
    )


@VARIANTS
def test_gradient_penalty_on_the_input_alone(textbook):
    """The first derivative in one tensor, differentiated in the others."""
    inputs, _ = make_problem(3, 2, 1, 3, textbook=textbook)
    gradients = []
    for function in (functional(textbook=textbook), eager_loop(textbook=textbook, reverse=False)):
        leaves = leaves_of(inputs)
        y, _ = function(**leaves)
        (dgx,) = torch.autograd.grad(y.square().sum(), leaves["gx"], create_graph=True)
        dgx.square().sum().backward()
        gradients.append([v.grad for v in leaves.values() if v is not None])
    assert_close(*gradients)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "all but"])
@pytest.mark.parametrize("name", ["gx", "h0", "w_hh", "b_hh"])
@FORMS
def test_frozen_inputs(name, alone, textbook, bias):
    inputs, cotangents = make_problem(4, 3, 1, 5, textbook=textbook, bias=bias)
    names = [k for k, v in inputs.items() if v is not None]
    trained = [k for k in names if (k == name) == alone]
    exact = differentiate(eager_loop(textbook=textbook, reverse=False), inputs, cotangents)
    for k in trained:
        inputs[k].requires_grad_()
    y, h_n = functional(textbook=textbook)(**inputs)
    assert y.requires_grad == bool(trained)
    if trained:
        torch.autograd.backward((y, h_n), tuple(cotangents.values()))
    for k in names:
        if k in trained:
            assert_close(inputs[k].grad, exact["d" + k])
        else:
            assert inputs[k].grad is None


@FORMS
@HALF
def test_autocast(textbook, bias, dtype):
    inputs, cotangents = make_problem(
        6, 4, 1, 16, textbook=textbook, bias=bias, dtype=torch.float32
    )
    cotangents = cast(cotangents, dtype)

    def ours(**leaves):
        with torch.autocast("cpu", dtype):
            y, h_n = functional(textbook=textbook)(**leaves)
        assert y.dtype == h_n.dtype == dtype
        return y, h_n

    loop = eager_loop(textbook=textbook, reverse=False)
    exact = differentiate(loop, cast(inputs, F64), cast(cotangents, F64))
    pytorch = loop if textbook else nn_gru(reverse=False)
    yardstick = differentiate(lambda **leaves: pytorch(**cast(leaves, dtype)), inputs, cotangents)
    actual = differentiate(ours, inputs, cotangents)
    assert all(t.dtype == torch.float32 for name, t in actual.items() if name[0] == "d")
    # Every gradient was a number of `dtype` before it became one of float32.
    assert_within_rule(cast(actual, dtype), exact, cast(yardstick, dtype))


@VARIANTS
def test_autocast_that_is_off_changes_nothing(textbook):
    inputs, _ = make_problem(2, 3, 1, 4, textbook=textbook, dtype=torch.float32)
    leaves = leaves_of(inputs)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        y, h_n = functional(textbook=textbook)(**leaves)
    assert y.dtype == h_n.dtype == torch.float32


@VARIANTS
def test_gates_are_saved_only_for_a_backward(textbook):
    T, B, D, H = 4, 3, 2, 5
    inputs, _ = make_problem(T, B, D, H, textbook=textbook)
    function, leaves = recurrence(textbook=textbook), leaves_of(inputs)
    with Seen() as seen:
        trained = function(**leaves)
        function(**inputs)
        with torch.no_grad():
            untracked = function(**leaves)
    (_, _, gates), *others = seen.calls
    assert gates.shape == (T, B, D, 3 if textbook else 4, H)
    assert len(others) == 2
    for _, _, gates in others:
        assert gates.numel() == 0
    assert not any(t.requires_grad for t in untracked)
    assert_close(untracked, tuple(t.detach() for t in trained))


@VARIANTS
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_without_gradients(mode, textbook):
    inputs, _ = make_problem(4, 3, 1, 5, textbook=textbook)
    with mode():
        actual = functional(textbook=textbook)(**inputs)
    assert_close(actual, eager_loop(textbook=textbook, reverse=False)(**inputs))


@VARIANTS
def test_meta_tensors(textbook):
    inputs, _ = make_problem(4, 3, 1, 5, textbook=textbook)
    inputs = {k: None if v is None else v.to("meta") for k, v in inputs.items()}
    y, h_n = functional(textbook=textbook)(**inputs)
    assert y.shape == (4, 3, 1, 5) and h_n.shape == (1, 3, 5)
    assert y.is_meta and h_n.is_meta


@VARIANTS
def test_compiles_into_one_graph(textbook):
    inputs, cotangents = make_problem(4, 3, 1, 5, textbook=textbook)
    compiled = torch.compile(functional(textbook=textbook), backend="aot_eager", fullgraph=True)
    assert_close(
        differentiate(compiled, inputs, cotangents),
        differentiate(eager_loop(textbook=textbook, reverse=False), inputs, cotangents),
    )


@pytest.mark.parametrize(
    "device, dtype, text",
    [
        (CPU, torch.float32, "the kernels run on CUDA devices, not on cpu"),
        (torch.device("meta"), torch.float16, "the kernels run on CUDA devices, not on meta"),
        (CUDA, F64, "the kernels compute in float16, bfloat16 and float32, not in torch.float64"),
    ],
    ids=str,
)
def test_why_no_kernel(device, dtype, text):
    assert ops.why_no_kernel(device, dtype, 64, False) == text


@pytest.fixture
def fallbacks(monkeypatch):
    """The texts of the warnings that `warn_of_fallback` gives for devices with each H as reason."""
    monkeypatch.setattr(ops, "_warned", set())
    monkeypatch.setattr(ops, "why_no_kernel", lambda device, dtype, H, textbook: f"H is {H}")

    def warned(device, *sizes):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for H in sizes:
                ops.warn_of_fallback(device, torch.float32, H, False)
        assert all(w.category is UserWarning for w in caught)
        return [str(w.message) for w in caught]

    return warned


def test_a_fallback_is_told_once_for_each_reason(fallbacks):
    told = "TriGRU falls back to a slower path: H is "
    assert fallbacks(CUDA, 8, 8, 9, 8, 9) == [told + "8", told + "9"]
    assert fallbacks(torch.device("cuda", 1), 8, 10) == [told + "10"]


def test_a_fallback_on_the_cpu_is_not_told(fallbacks):
    assert fallbacks(CPU, 8, 9) == []


def test_without_triton():
    """Where Triton does not exist the package imports, and runs through PyTorch."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, trigru
        import perf.__main__
        y, h_n = trigru.TriGRU(3, 4, variant="textbook")(torch.randn(2, 3, 3))
        assert y.shape == (2, 3, 4)
        device = torch.device("cuda", 0)
        print(trigru.ops.why_no_kernel(device, torch.float32, 4, False))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "Triton is not installed", run.stderr


@FORMS
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("D, reverse", [(1, True), (2, False)], ids=str)
def test_flops(D, reverse, packed, textbook, bias):
    """As many as of the same products one by one."""
    offsets = offsets_of([5, 3, 3, 1]) if packed else None
    how = {"textbook": textbook, "dtype": torch.float32, "offsets": offsets}
    inputs, cotangents = problem(5, 4, D, 6, **how)
    inputs = inputs if bias else inputs | {"b_hh": None}

    def ours(**leaves):
        return ops.recurrence(**leaves, offsets=offsets, textbook=textbook, reverse=reverse)

    counts = []
    for function in (ours, eager_loop(textbook=textbook, reverse=reverse, offsets=offsets)):
        leaves = leaves_of(inputs)
        with FlopCounterMode(display=False) as counter:
            results = function(**leaves)
        forwards = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(results, tuple(cotangents.values()))
        counts.append((forwards, counter.get_total_flops()))
    rows = 20 if offsets is None else 12
    products = 2 * rows * D * 18 * 6
    # A step back is multiplied by U once, and once more for the gradient of U.
    assert counts == [(products, 2 * products)] * 2


def test_autocast_leaves_float64_and_integers_alone():
    x, i = torch.randn(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in ops.autocast(x, i, x.float())] == [
            x.dtype,
            i.dtype,
            torch.bfloat16,
        ]
