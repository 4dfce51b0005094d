"""The kernels on a real device: numbers by the tolerance rule, with cuDNN as the yardstick."""

import copy
from functools import partial

import pytest
import torch
from numerics import assert_within_rule
from torch import nn

from trigru import (
    TriGRU,
    backward,
    forward,
    gru,
    launch,
    ops,
    reference,
    resets_from_cu_seqlens,
    tiles,
)
from trigru.accuracy import (
    differentiate,
    problem,
    products_as_in_rnns,
    relative_error,
    yardsticks,
)  # fmt: skip
from trigru.ops import without_cudnn
from trigru.plan import LaunchPlan, NoPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    pytest.mark.filterwarnings("ignore:TriGRU falls back"),
]
DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WALK = {"offsets": None, "textbook": False, "reverse": False, "bidirectional": False}
VARIANTS = pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])
NAMES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
DTYPES = pytest.mark.parametrize("dtype", NAMES.values(), ids=NAMES)
SHAPES = [  # T, B, D, H
    (1, 1, 1, 1),
    (33, 20, 2, 64),
    (64, 40, 1, 100),
    (64, 1, 1, 256),
    (50, 3, 1, 300),
    (40, 300, 1, 512),
    (20, 16, 2, 768),
    (20, 64, 1, 1024),
    (10, 16, 2, 2048),
    (10, 200, 1, 2048),
    (3, 1500, 1, 64),  # tiles of 16 and 32 rows where one program has all of U
    (3, 2500, 1, 128),
]
REGIMES = pytest.mark.parametrize(
    "B, H", [(1100, 64), (16, 512), (2000, 256)], ids=["solo", "latency", "throughput"]
)
EVERYTHING = ("resets", "reset_state", "update_scale")


@pytest.fixture(params=[True, False], ids=["tf32", "ieee"])
def tf32(request):
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if request.param else "ieee"
    yield request.param
    torch.backends.cudnn.rnn.fp32_precision = before


def run(inputs, cotangents, **how):
    return differentiate(partial(ops.recurrence, **how), inputs, cotangents)


def make_resets(gx, probability=0.2):
    """Random ones for this input (T, B, D, 3H) or (N, D, 3H)."""
    return torch.rand(gx.shape[:-1], device=gx.device) < probability


def modified(inputs, names):
    """The inputs with those of the modifiers that are differentiable, and the other ones."""
    gx, h0 = inputs["gx"], inputs["h0"]
    made = {
        "reset_state": torch.randn_like(h0[:, 0]),
        "update_scale": torch.rand_like(gx[..., : h0.shape[-1]]),
        "resets": make_resets(gx),
    }
    made = {name: made[name] for name in names}
    resets = made.pop("resets", None)
    return inputs | made, {} if resets is None else {"resets": resets}


def in_float64(module, *arguments):
    """The first result of a module, computed in float64 without a kernel."""
    double = copy.deepcopy(module).double()
    with torch.no_grad():
        return double(*(t.double() for t in arguments))[0]


KERNELS_ALONE = ("y", "h_n", "dgx", "dh0")  # no product of cuBLAS has a part in these
GRADIENTS = ("dgx", "dgh", "dh0", "dreset_state", "dupdate_scale")  # of the walk back


def assert_same(actual, expected, exact):
    """The same bits where the kernels alone compute; where cuBLAS may choose another way, as it
    may for another stream or another shape, the rule, beside the other results."""
    for name in KERNELS_ALONE:
        assert torch.equal(actual[name], expected[name]), name
    assert_within_rule(actual, exact, expected)


def has_kernels(H, dtype, textbook):
    device = torch.device(DEVICE, torch.cuda.current_device())
    return ops.why_no_kernel(device, dtype, H, textbook) is None


@VARIANTS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(shape, dtype, textbook):
    T, B, D, H = shape
    if torch.cuda.get_device_capability()[0] == 9:  # or a fallback would be compared with itself
        assert has_kernels(H, dtype, textbook) == (dtype != FP32 or H <= 1024)
    inputs, cotangents = problem(T, B, D, H, textbook=textbook, dtype=dtype, device=DEVICE)
    exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook)
    assert_within_rule(run(inputs, cotangents, textbook=textbook), exact, yardstick)


def test_a_missing_program_ends_in_an_error(monkeypatch):
    """A launch whose group lacks its last program gives up, says so, and yields NaN."""
    real = ops.plan_for(torch.device(DEVICE, 0), 16, 512, 1, BF16, False, False)

    class Short(LaunchPlan):
        def grid(self, B):
            groups, tiles, directions = super().grid(B)
            return groups - 1, tiles, directions

    short = Short(**{f: getattr(real, f) for f in real.__dataclass_fields__})
    monkeypatch.setattr(launch, "WAIT_POLLS", 6_000_000)
    inputs, _ = problem(20, 16, 1, 512, textbook=False, dtype=BF16, device=DEVICE)
    y, *_ = forward.gru_forward(**inputs, **WALK, save=False, plan=short)
    torch.cuda.synchronize()
    assert y[2:].isnan().all()
    with pytest.raises(launch.ExchangeTimeout, match="gave up waiting"):
        run(*problem(1, 1, 1, 512, textbook=False, dtype=BF16, device=DEVICE), textbook=False)


def test_cuda_graph_replays():
    layer = TriGRU(256, 512, device=DEVICE, dtype=BF16)
    x = torch.randn(30, 16, 256, device=DEVICE, dtype=BF16)
    inputs, _ = problem(30, 16, 1, 512, textbook=False, dtype=BF16, device=DEVICE)
    with torch.no_grad():
        layer(x)
        ops.recurrence(**inputs, textbook=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(x)
            alone, _ = ops.recurrence(**inputs, textbook=False)
        for _ in range(3):
            x.normal_()
            inputs["gx"].normal_()
            graph.replay()
            assert torch.equal(alone, ops.recurrence(**inputs, textbook=False)[0])
            assert_within_rule({"y": y}, {"y": in_float64(layer, x)}, {"y": layer(x)[0]})


@VARIANTS
def test_many_launches_in_a_row(textbook):
    """Nothing has to be reset between launches; memory that is used again brings no old data."""
    inputs, cotangents = problem(50, 64, 1, 512, textbook=textbook, dtype=BF16, device=DEVICE)
    exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook)
    for _ in range(100):
        actual = run(inputs, cotangents, textbook=textbook)
    assert_within_rule(actual, exact, yardstick)


@VARIANTS
@pytest.mark.parametrize("H", [64, 256, 512])
def test_float32_follows_pytorch_s_precision(tf32, H, textbook):
    inputs, cotangents = problem(20, 16, 1, H, textbook=textbook, dtype=FP32, device=DEVICE)
    exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook)
    actual = run(inputs, cotangents, textbook=textbook)
    assert_within_rule(actual, exact, yardstick)
    if not tf32:
        with_tf32 = 2.0**-11  # one rounding to TF32, which no product may have had
        assert max(relative_error(actual[name], exact[name]) for name in exact) < with_tf32 / 8


@VARIANTS
@pytest.mark.parametrize("H", [64, 512])
def test_reversed(H, textbook):
    inputs, cotangents = problem(20, 5, 1, H, textbook=textbook, dtype=BF16, device=DEVICE)
    exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook, reverse=True)
    actual = run(inputs, cotangents, textbook=textbook, reverse=True)
    assert_within_rule(actual, exact, yardstick)


@VARIANTS
@pytest.mark.parametrize(
    "dtype, B, D, H",
    [(BF16, 37, 2, 64), (BF16, 200, 1, 512), (FP16, 20, 2, 1000), (FP32, 70, 1, 300)],
    ids=str,
)
@pytest.mark.parametrize("names", [(), EVERYTHING], ids=["", "modified"])
def test_packed(names, dtype, B, D, H, textbook):
    lengths = torch.randint(1, 40, (B,)).sort(descending=True).values
    running = (lengths > torch.arange(int(lengths[0]))[:, None]).sum(1)
    offsets = nn.functional.pad(running.cumsum(0), (1, 0)).to(DEVICE)
    how = {"textbook": textbook, "offsets": offsets}
    inputs, cotangents = problem(0, B, D, H, dtype=dtype, device=DEVICE, **how)
    inputs, modifiers = modified(inputs, names)
    actual = run(inputs, cotangents, **how, **modifiers)
    assert_within_rule(actual, *yardsticks(inputs, cotangents, **how, **modifiers))


def test_packed_sequences_in_a_graph_are_refused():
    layer = TriGRU(8, 64, device=DEVICE)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 8, device=DEVICE)])
    layer(packed)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="give the layer padded input"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        layer(packed)


@VARIANTS
@DTYPES
@pytest.mark.parametrize("H", [100, 512])
def test_same_bits_every_time(H, dtype, textbook):
    inputs, cotangents = problem(100, 40, 2, H, textbook=textbook, dtype=dtype, device=DEVICE)
    first = run(inputs, cotangents, textbook=textbook)
    for _ in range(5):
        again = run(inputs, cotangents, textbook=textbook)
        assert all(torch.equal(first[name], again[name]) for name in first)


@VARIANTS
@DTYPES
@pytest.mark.parametrize("H", [100, 512])
@pytest.mark.parametrize("where", ["gx", "h0"])
def test_nan_with_the_sentinel_s_bits_stays_in_its_row(where, H, dtype, textbook):
    inputs, cotangents = problem(20, 20, 1, H, textbook=textbook, dtype=dtype, device=DEVICE)
    clean = run(inputs, cotangents, textbook=textbook)
    poisoned = inputs[where].clone()
    row = poisoned[3, 7] if where == "gx" else poisoned[0, 7]
    row.view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).fill_(-1)
    actual = run(inputs | {where: poisoned}, cotangents, textbook=textbook)
    assert actual["y"][-1, 7].isnan().all()
    others = [b for b in range(20) if b != 7]
    assert torch.equal(actual["y"][:, others], clean["y"][:, others])
    assert torch.equal(actual["dgx"][:, others], clean["dgx"][:, others])


def strided(tensor):
    """The same values with gaps between them, and not where a vector load could start."""
    return torch.stack((tensor, tensor), -1)[..., 1]


@VARIANTS
@pytest.mark.parametrize("H", [100, 512])
def test_arguments_as_users_pass_them(H, textbook):
    variant = "textbook" if textbook else "torch"
    inputs, _ = problem(9, 5, 1, H, textbook=textbook, dtype=BF16, device=DEVICE)
    gx, h0, w_hh = inputs["gx"].squeeze(2), inputs["h0"][0], inputs["w_hh"][0]
    b_hh = None if textbook else inputs["b_hh"][0]
    leaves = [t.clone().requires_grad_() for t in (gx, h0, w_hh)]

    def gradients(y, h_n):
        # Expanded (stride 0) gradients, of one result alone and of both.
        losses = (y.sum(), h_n.sum(), y.sum() + h_n.sum())
        return [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]

    plain = gru(*leaves, b_hh, variant=variant)
    odd = gru(*map(strided, leaves), None if textbook else strided(b_hh), variant=variant)
    for results in ((plain, odd), *zip(gradients(*plain), gradients(*odd), strict=True)):
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    y, h_n = gru(gx[:, :0], h0[:0], w_hh, b_hh, variant=variant)
    assert y.shape == (9, 0, H) and h_n.shape == (0, H)


def at_odd_offset(tensor):
    """The same values, contiguous, one element behind where a vector load could start."""
    stored = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return stored[1:].view(tensor.shape).copy_(tensor)


def kernels_compiled():
    """How many this process has, of both passes and of what packs resets for them."""
    device = torch.cuda.current_device()
    kernels = (
        forward._gru_forward_kernel, backward._gru_backward_kernel, tiles._pack_resets_kernel,
    )  # fmt: skip
    return [len(kernel.device_caches[device][0]) for kernel in kernels]


@VARIANTS
@pytest.mark.parametrize("H", [64, 100, 512])
def test_any_offset_is_the_same_kernel(H, textbook):
    """h0, weights, biases and dh_n are often views of something larger."""
    inputs, cotangents = problem(9, 5, 1, H, textbook=textbook, dtype=BF16, device=DEVICE)
    aligned = run(inputs, cotangents, textbook=textbook)
    exact, _ = yardsticks(inputs, cotangents, textbook=textbook)
    before = kernels_compiled()

    def odd(gx, **others):
        others = {name: None if t is None else at_odd_offset(t) for name, t in others.items()}
        y, h_n = ops.recurrence(gx, **others, textbook=textbook)
        assert all(t is None or t.data_ptr() % 16 for t in others.values())
        return y, h_n

    dh_n = at_odd_offset(cotangents["dh_n"])
    assert_same(differentiate(odd, inputs, cotangents | {"dh_n": dh_n}), aligned, exact)
    assert kernels_compiled() == before


@VARIANTS
@pytest.mark.parametrize("H", [64, 512])
def test_layers_whose_parameters_are_at_any_offset(H, textbook):
    layer = TriGRU(8, H, 2, variant="textbook" if textbook else "torch", device=DEVICE, dtype=BF16)
    x, hx = torch.randn(9, 5, 8, device=DEVICE), torch.randn(2, 5, H, device=DEVICE).tanh()
    x, hx = x.to(BF16), hx.to(BF16)

    def outcome(hx):
        y, h_n = layer(x, hx)
        grads = torch.autograd.grad(y.square().sum() + h_n.sum(), list(layer.parameters()))
        names = [name for name, _ in layer.named_parameters()]
        return {"y": y.detach(), "h_n": h_n.detach(), **dict(zip(names, grads, strict=True))}

    aligned = outcome(hx)
    before = kernels_compiled()
    for p in layer.parameters():
        p.data = at_odd_offset(p.data)
    actual, after = outcome(at_odd_offset(hx)), kernels_compiled()
    layer.double()
    x = x.double()
    assert_within_rule(actual, outcome(hx.double()), aligned)
    assert after == before


@VARIANTS
def test_derivatives_without_a_kernel(textbook):
    """In float64, where cuDNN has neither gradients in eval mode nor second ones."""
    layer = TriGRU(2, 3, variant="textbook" if textbook else "torch", device=DEVICE).double().eval()
    x = torch.randn(3, 2, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


@VARIANTS
@pytest.mark.parametrize("H", [64, 512])
def test_ensembles(H, textbook):
    """vmap over weights is further recurrences of one launch; over inputs, further sequences."""
    models = [TriGRU(8, H, bidirectional=True, variant="textbook" if textbook else "torch",
                     device=DEVICE, dtype=BF16) for _ in range(3)]  # fmt: skip
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 20, 5, 8, device=DEVICE, dtype=BF16)

    def call(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))[0]

    def assert_close(actual, each, exact):
        assert_within_rule({"y": actual}, {"y": torch.stack(exact)}, {"y": torch.stack(each)})

    # Under vmap the input projection is another product, with the bias added to its rounded sums.
    together = torch.func.vmap(call)(parameters, buffers, x)
    pairs = list(zip(models, x, strict=True))
    each, exact = [model(xs)[0] for model, xs in pairs], [in_float64(*pair) for pair in pairs]
    assert_close(together, each, exact)
    rows = torch.func.vmap(lambda xs: models[0](xs)[0])(x)
    assert_close(rows, [models[0](xs)[0] for xs in x], [in_float64(models[0], xs) for xs in x])


def test_per_sample_gradients():
    layer = TriGRU(8, 256, device=DEVICE)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(4, 12, 1, 8, device=DEVICE)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    alone = [torch.func.grad(loss)(parameters, sample) for sample in x]
    layer.double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    exact = [torch.func.grad(loss)(parameters, sample) for sample in x.double()]
    alone, exact = (
        {name: torch.stack([grads[name] for grads in samples]) for name in each}
        for samples in (alone, exact)
    )
    assert_within_rule(each, exact, alone)


@VARIANTS
def test_gradients_in_batches(textbook):
    """In autograd's thread for the device, which does not know of the vmap around the call."""
    layer = TriGRU(8, 64, variant="textbook" if textbook else "torch", device=DEVICE)
    x, batch = torch.randn(5, 3, 8, device=DEVICE), torch.randn(4, 5, 3, 64, device=DEVICE)

    def gradients(layer, x, batch, together):
        x = x.clone().requires_grad_()
        inputs, (y, _) = {"x": x, **dict(layer.named_parameters())}, layer(x)
        leaves = list(inputs.values())
        if together:
            found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
        else:
            each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in batch]
            found = map(torch.stack, zip(*each, strict=True))
        return dict(zip(inputs, found, strict=True))

    actual, alone = (gradients(layer, x, batch, together) for together in (True, False))
    exact = gradients(layer.double(), x.double(), batch.double(), False)
    assert_within_rule(actual, exact, alone)


@VARIANTS
def test_on_another_stream(textbook):
    inputs, cotangents = problem(50, 20, 1, 512, textbook=textbook, dtype=BF16, device=DEVICE)
    expected = run(inputs, cotangents, textbook=textbook)
    exact, _ = yardsticks(inputs, cotangents, textbook=textbook)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        actual = run(inputs, cotangents, textbook=textbook)
    torch.cuda.synchronize()
    assert_same(actual, expected, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_on_a_device_that_is_not_the_current_one():
    other = torch.device(DEVICE, 1)
    for H in (64, 512):
        layer = TriGRU(8, H, device=other, dtype=BF16)
        x = torch.randn(9, 5, 8, device=other, dtype=BF16)
        with torch.cuda.device(0):
            y, _ = layer(x)
            y.float().sum().backward()
        with torch.cuda.device(1):
            assert_within_rule({"y": y}, {"y": in_float64(layer, x)}, {"y": layer(x)[0]})
        assert y.device == layer.weight_hh_l0.grad.device == other


@VARIANTS
def test_second_derivatives_and_eval(textbook):
    variant = "textbook" if textbook else "torch"
    layer = TriGRU(8, 64, variant=variant, device=DEVICE).eval()
    x = torch.randn(5, 3, 8, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.isfinite().all() and second.isfinite().all() and second.any()


def test_a_group_that_cannot_all_run_is_refused():
    """The plan bounds the grid by the SMs; were it wrong, the launch would err, not hang."""
    real = ops.plan_for(torch.device(DEVICE, 0), 16, 1024, 1, BF16, False, False)
    fields = {f: getattr(real, f) for f in real.__dataclass_fields__}
    too_large = LaunchPlan(**fields | {"batch_programs": 64})  # of 64 programs each
    inputs, _ = problem(2, 16 * 64, 1, 1024, textbook=False, dtype=BF16, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"(?i)cooperative"):
        forward.gru_forward(**inputs, **WALK, save=False, plan=too_large)


@VARIANTS
@pytest.mark.parametrize("save", ["gates", "state"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers(bidirectional, save, textbook, monkeypatch):
    """A whole stack of layers, beside the same stack on PyTorch's own path on the device."""
    variant = "textbook" if textbook else "torch"
    shape = dict(num_layers=2, bidirectional=bidirectional, batch_first=True, variant=variant)
    layer = TriGRU(96, 320, **shape, save=save, device=DEVICE)
    double = TriGRU(96, 320, **shape, dtype=torch.float64)
    double.load_state_dict(layer.state_dict())
    x = torch.randn(7, 31, 96, device=DEVICE)

    def outcome(module, x):
        y, h_n = module(x)
        (y.square().sum() + h_n.sum()).backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        module.zero_grad(set_to_none=True)
        return {"y": y.detach(), "h_n": h_n.detach(), **grads}

    actual = outcome(layer, x)
    exact = {name: t.to(DEVICE) for name, t in outcome(double, x.double().cpu()).items()}
    monkeypatch.setattr(ops, "why_no_kernel", lambda *_: "the test asks for PyTorch's path")
    layer.save = "gates"  # or PyTorch's own GRU would not do
    with products_as_in_rnns():
        assert_within_rule(actual, exact, outcome(layer, x))


@VARIANTS
@pytest.mark.parametrize("save", ["gates", "state"])
def test_memory_that_a_call_keeps(save, textbook):
    """In units of T·B·H: y and, unless the state is enough, the gates; x is the caller's."""
    T, B, H = 200, 16, 512
    variant = "textbook" if textbook else "torch"
    layer = TriGRU(H, H, variant=variant, save=save, device=DEVICE, dtype=BF16)
    x = torch.randn(T, B, H, device=DEVICE, dtype=BF16)
    layer(x)[0].sum().backward()  # what is made once: cuBLAS' workspace, gradients
    before = torch.cuda.memory_allocated()
    outputs = layer(x)
    kept = (torch.cuda.memory_allocated() - before) / outputs[0].untyped_storage().nbytes()
    assert round(kept, 1) == (1 if save == "state" else 4 if textbook else 5)


@VARIANTS
def test_steps(textbook):
    """One after the other, and as a graph over tensors that stay where they are."""
    variant = "textbook" if textbook else "torch"
    layer = TriGRU(32, 64, num_layers=2, variant=variant, device=DEVICE)
    xs = torch.randn(12, 8, 32, device=DEVICE)
    x, hx = torch.zeros(8, 32, device=DEVICE), torch.zeros(2, 8, 64, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        whole, exact = layer(xs)[0], in_float64(layer, xs)
        stepped, h = [], None
        for x_t in xs:
            y_t, h = layer.step(x_t, h)
            stepped.append(y_t)
        assert_within_rule({"y": torch.stack(stepped)}, {"y": exact}, {"y": whole})
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y, h_n = layer.step(x, hx)
            hx.copy_(h_n)
        for _ in range(2):  # episodes
            hx.zero_()
            replayed = []
            for x_t in xs:
                x.copy_(x_t)
                graph.replay()
                replayed.append(y.clone())
            assert_within_rule({"y": torch.stack(replayed)}, {"y": exact}, {"y": whole})


def test_autocast_and_compile():
    layer = TriGRU(64, 256, 2, device=DEVICE)
    x = torch.randn(20, 8, 64, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.autocast(DEVICE, BF16):
        y, h_n = compiled(x)
        eager, _ = layer(x)
    assert y.dtype == h_n.dtype == BF16
    assert_within_rule({"y": y}, {"y": in_float64(layer, x)}, {"y": eager})
    y.float().sum().backward()
    assert all(p.grad.dtype == FP32 and p.grad.isfinite().all() for p in layer.parameters())


def test_beyond_the_device_falls_back_and_says_so():
    H = 8192
    with pytest.raises(NoPlan):
        ops.plan_for(torch.device(DEVICE, 0), 1, H, 1, BF16, False, False)
    ops._warned.clear()
    layer = TriGRU(16, H, device=DEVICE, dtype=BF16)
    x = torch.randn(2, 2, 16, device=DEVICE, dtype=BF16)
    with pytest.warns(UserWarning, match="slower path: U with hidden size 8192"):
        y, _ = layer(x)
    with without_cudnn():
        theirs, _ = layer.to_torch()(x)
    assert_within_rule({"y": y}, {"y": in_float64(layer, x)}, {"y": theirs})


# ------------------------------------------------------------ resets, scales, clips, heads, chunks


@VARIANTS
@REGIMES
@pytest.mark.parametrize(
    "dtype, D, heads, names",
    [
        (BF16, 1, 1, ("resets",)),
        (FP32, 2, 1, ("resets", "reset_state")),
        (FP16, 2, 2, ("update_scale",)),
        *((dtype, 4, 2, EVERYTHING) for dtype in NAMES.values()),
    ],
    ids=str,
)
def test_modified_numbers(dtype, D, heads, names, B, H, textbook):
    """Two heads of one direction, and of both; more than 32 steps, whose resets are one word."""
    inputs, cotangents = problem(
        5 if B == 2000 else 37, B, D, H, textbook=textbook, dtype=dtype, device=DEVICE
    )
    inputs, modifiers = modified(inputs, names)
    how = {"textbook": textbook, **modifiers} | ({"heads": heads} if heads > 1 else {})
    actual = run(inputs, cotangents, **how)
    assert_within_rule(actual, *yardsticks(inputs, cotangents, **how))


@VARIANTS
@pytest.mark.parametrize(
    "dtype, B, H", [(FP16, 1100, 64), (BF16, 16, 512), (FP32, 2000, 256)], ids=str
)
def test_clipped(dtype, B, H, textbook):
    """A state next to the clip may be rounded to it or not, which the gradients show: those that
    come of the same saved tensors are compared."""
    inputs, cotangents = problem(9, B, 1, H, textbook=textbook, dtype=dtype, device=DEVICE)
    limit, how = launch.rounded(0.3, dtype), {"textbook": textbook, "clip": 0.3}
    switches = textbook, False, False, 1, 0.3  # and no modifiers before them
    y, h_n, gates = torch.ops.trigru.forward(*inputs.values(), *[None] * 4, *switches, True)
    assert y.abs().max() == limit
    results = {"y": y, "h_n": h_n}
    exact, yardstick = yardsticks(inputs, cotangents, **how)
    assert_within_rule(results, *({k: of[k] for k in results} for of in (exact, yardstick)))

    saved = *cotangents.values(), inputs["h0"], inputs["w_hh"], y, gates
    back = torch.ops.trigru.backward(*saved, *[None] * 4, *switches)

    def theirs(dtype):
        with products_as_in_rnns():
            results = reference.gru_backward(
                *(t.to(dtype) for t in saved), **WALK | how | {"clip": limit}
            )
        return dict(zip(GRADIENTS, results, strict=True))

    actual = dict(zip(GRADIENTS, back, strict=True))
    assert_within_rule(actual, theirs(torch.float64), theirs(dtype))


@VARIANTS
@REGIMES
def test_another_mask_compiles_nothing_and_is_waited_for_by_nobody(B, H, textbook):
    """In a graph, whose capture refuses to wait, forward and backward."""
    inputs, cotangents = problem(9, B, 1, H, textbook=textbook, dtype=BF16, device=DEVICE)
    masks = [make_resets(inputs["gx"], p) for p in (0.2, 0.5, 0, 1)]
    resets = at_odd_offset(masks[0])

    def both_ways(resets):
        with torch.no_grad():
            y, _ = ops.recurrence(**inputs, textbook=textbook, resets=resets)
        return y, run(inputs, cotangents, textbook=textbook, resets=resets)

    both_ways(resets)
    before = kernels_compiled()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed, trained = both_ways(resets)
    for mask in masks:
        resets.copy_(mask)
        graph.replay()
        expected, actual = both_ways(mask)
        exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook, resets=mask)
        assert_within_rule(actual, exact, yardstick)
        assert torch.equal(replayed, expected)
        assert_same(trained, actual, exact)
    assert kernels_compiled() == before


def in_chunks(lengths, *, reverse=False, resets, **how):
    """`gru` from chunk to chunk, each from the h_n of the one before, for `differentiate`."""

    def walk(gx, h0, w_hh, b_hh):
        h, ys = h0[0], []
        parts = list(zip(gx.squeeze(2).split(lengths), resets.split(lengths), strict=True))
        for gx_part, resets_part in parts[:: -1 if reverse else 1]:
            b = None if b_hh is None else b_hh[0]
            y, h = gru(gx_part, h, w_hh[0], b, reverse=reverse, resets=resets_part, **how)
            ys.append(y)
        return torch.cat(ys[:: -1 if reverse else 1]).unsqueeze(2), h.unsqueeze(0)

    return walk


def check_chunks(lengths, B, H, dtype, textbook, reverse):
    """Against the whole, bit for bit: the state and its gradient are float32 in between."""
    T = sum(lengths)
    inputs, cotangents = problem(T, B, 1, H, textbook=textbook, dtype=dtype, device=DEVICE)
    inputs["h0"], cotangents["dh_n"] = inputs["h0"].float(), cotangents["dh_n"].float()
    resets = make_resets(inputs["gx"], 0.05).squeeze(2)
    how = {"reverse": reverse, "resets": resets, "variant": "textbook" if textbook else "torch"}
    whole = differentiate(in_chunks([T], **how), inputs, cotangents)
    actual = differentiate(in_chunks(lengths, **how), inputs, cotangents)
    assert whole["h_n"].dtype == FP32
    for name in KERNELS_ALONE:
        assert torch.equal(actual[name], whole[name]), name


@VARIANTS
@pytest.mark.parametrize("B, H", [(3, 64), (1100, 64), (16, 512), (2000, 256)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_chunks_are_the_whole_bit_for_bit(reverse, dtype, B, H, textbook):
    """Of one step, of odd and of even numbers of steps, and of more than resets have in a word."""
    check_chunks([1, 6, 33, 30], B, H, dtype, textbook, reverse)


@VARIANTS
@pytest.mark.gpu(compiled_ahead=False)  # a loop would take minutes; the kernels are those above
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B, H", [(1, 64), (1, 512)])
def test_more_steps_than_cudnn_takes(B, H, dtype, textbook):
    check_chunks([23_333, 23_334, 23_333], B, H, dtype, textbook, False)


@VARIANTS
@REGIMES
@pytest.mark.gpu(compiled_ahead=False)
def test_more_elements_than_32_bits_count(B, H, textbook):
    """Beside chunks of which even the bytes are fewer, bit for bit."""
    T = 2**31 // (B * H) + 7
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], 32 * 2**30  # gx, y, r ⊙ h and chunks of these
    if free < needed:
        pytest.skip(f"needs a device with {needed >> 30} GiB free, this one has {free >> 30}")
    inputs, _ = problem(1, B, 1, H, textbook=textbook, dtype=BF16, device=DEVICE)
    inputs["gx"] = torch.randn(T, B, 1, 3 * H, dtype=BF16, device=DEVICE)
    inputs["h0"] = inputs["h0"].float()
    resets = make_resets(inputs["gx"], 0.01)
    with torch.no_grad():
        y, h_n = ops.recurrence(**inputs, textbook=textbook, resets=resets)
        begin, h = 0, inputs["h0"]
        for gx, mask in zip(inputs["gx"].split(T // 8), resets.split(T // 8), strict=True):
            part = inputs | {"gx": gx, "h0": h}
            y_part, h = ops.recurrence(**part, textbook=textbook, resets=mask)
            assert torch.equal(y[begin : begin + len(gx)], y_part), begin
            begin += len(gx)
    assert begin == T and torch.equal(h, h_n)


@VARIANTS
@REGIMES
@pytest.mark.parametrize("output", ["y", "h_n"])
def test_one_output_alone(output, B, H, textbook):
    """The gradient of the other one is None, not zeros."""
    inputs, cotangents = problem(7, B, 1, H, textbook=textbook, dtype=BF16, device=DEVICE)

    def recurrence(**leaves):
        results = dict(zip(("y", "h_n"), ops.recurrence(**leaves, textbook=textbook), strict=True))
        unused = {k: t.detach().requires_grad_() for k, t in results.items()}
        used = unused | {output: results[output]}
        return used["y"], used["h_n"]

    zeros = {k: torch.zeros_like(t) for k, t in cotangents.items() if k != f"d{output}"}
    exact, yardstick = yardsticks(inputs, cotangents | zeros, textbook=textbook)
    assert_within_rule(differentiate(recurrence, inputs, cotangents), exact, yardstick)


@VARIANTS
@pytest.mark.parametrize("H", [64, 512])
def test_documents(H, textbook):
    """Back to back in one sequence they are what each is alone, in both directions."""
    variant = "textbook" if textbook else "torch"
    shape = {"bidirectional": True, "variant": variant, "learn_reset": True}
    layer = TriGRU(8, H, **shape, device=DEVICE, dtype=BF16)
    nn.init.normal_(layer.reset_state)
    x = torch.randn(45, 8, device=DEVICE, dtype=BF16)
    cu_seqlens = torch.tensor([0, 7, 8, 41, 41, 45], device=DEVICE)
    resets = resets_from_cu_seqlens(cu_seqlens, 45, bidirectional=True)
    assert resets.device == x.device
    with torch.no_grad():
        y, _ = layer(x, resets=resets)
        documents = [each for each in x.split(cu_seqlens.diff().tolist()) if len(each)]
        alone = torch.cat([layer(each)[0] for each in documents])
    exact = torch.cat([in_float64(layer, each) for each in documents])
    assert_within_rule({"y": y}, {"y": exact}, {"y": alone})


@pytest.mark.gpu(compiled_ahead=False)
def test_documents_that_are_none():
    """Refused where they can be looked at; a graph holds right ones, and looks at them itself."""
    for wrong in ([1, 4, 9], [0, 4, 8], [0, 5, 4, 9]):
        with pytest.raises(ValueError, match="begin with 0, never decrease and end with T = 9"):
            resets_from_cu_seqlens(torch.tensor(wrong, device=DEVICE), 9)
    cu_seqlens = torch.tensor([0, 4, 9], device=DEVICE)
    resets_from_cu_seqlens(cu_seqlens, 9)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        resets = resets_from_cu_seqlens(cu_seqlens, 9)
    for begin in (4, 7):
        cu_seqlens[1] = begin
        graph.replay()
        assert resets.nonzero().flatten().tolist() == [0, begin]
