"""Training with what PyTorch has around a layer: several processes, checkpoints, optimisers.

Run as a module by torchrun, as `two_processes` does, this file is one of the processes."""

import csv
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from perf import train
from trigru import TriGRU, ops

ROOT = Path(__file__).parents[1]
F64 = torch.float64
IN, H, OUT, T, B = 5, 5, 3, 4, 4  # 2 processes hold 8 and 7 of a weight's 3H rows
STEPS, CLIP_NORM = 3, 0.5  # clips some steps' gradients, not all
VARIANT = pytest.mark.parametrize("variant", ops.VARIANTS)
EXACT = {"rtol": 0, "atol": 0}
# For what differs in the order of float64 sums: weights below 1 then differ by some 1e-16. The
# errors tried, as gradients that are not averaged, put the gradients' norms off by 0.1 and more.
ROUNDING = {"rtol": 0, "atol": 1e-12}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # it may well be
    pytest.mark.usefixtures("one_thread"),
]


class Tagger(nn.Module):
    """Both kinds of layer: directions, whose weights are stacked, and one, whose are not."""

    def __init__(self, variant):
        super().__init__()
        self.gru = TriGRU(IN, H, num_layers=2, bidirectional=True, variant=variant, dtype=F64)
        self.top = TriGRU(2 * H, H, variant=variant, dtype=F64)
        self.head = nn.Linear(H, OUT, dtype=F64)

    def forward(self, x):
        return self.head(self.top(self.gru(x)[0])[0])


def make_tagger(variant, seed=0):
    torch.manual_seed(seed)
    return Tagger(variant)


def batch(step, dtype=F64):
    """x (T, B, I) and targets (T, B, OUT), the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(T, B, size, dtype=dtype, generator=generator) for size in (IN, OUT))


def train_tagger(model, rank=0, processes=1):
    """Train on this process's rows of each batch; the norms of the gradients."""
    # SGD: Adam would hide gradients that are wrong by a factor.
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = []
    for step in range(STEPS):
        x, targets = (t.chunk(processes, dim=1)[rank] for t in batch(step))
        optimiser.zero_grad()
        (model(x) - targets).square().mean().backward()
        norms.append(whole(clip_grad_norm_(model.parameters(), CLIP_NORM)))
        optimiser.step()
    return torch.stack(norms)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


# Several processes


def torchrun(*arguments):
    """Run a module in 2 processes; what they wrote to stdout."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_taggers(folder):
    """One process of `two_processes`: train with either wrapper, and leave what came of it."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, processes = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (processes,))
    for variant in ops.VARIANTS:
        # Each process from weights of its own: those of the first count.
        model = make_tagger(variant, seed=rank)
        norms = train_tagger(DistributedDataParallel(model), rank, processes)
        leave(folder / f"ddp-{variant}-{rank}.pt", model, norms)

        model = shard(make_tagger(variant), mesh)
        norms = train_tagger(model, rank, processes)
        leave(folder / f"fsdp-{variant}-{rank}.pt", model, norms)
        dcp.save({"model": model.state_dict()}, checkpoint_id=folder / f"sharded-{variant}")

        # The first process alone holds the whole checkpoint, and the model is nowhere yet.
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)
        with torch.device("meta"):
            model = make_tagger(variant)
        shard(model, mesh)
        whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=whole)
        leave(folder / f"broadcast-{variant}-{rank}.pt", model, norms)
    dist.destroy_process_group()
    # At the interpreter's regular end, a thread of gloo's that is still freeing the tensor of the
    # last collective aborts the process: seen in one run of twenty.
    os._exit(0)


def shard(model, mesh):
    for module in (model.gru, model.top, model):
        fully_shard(module, mesh=mesh)
    return model


def leave(path, model, norms):
    weight = model.gru.weight_hh_l0
    rows = len(weight.to_local() if isinstance(weight, DTensor) else weight)
    weights = {name: whole(w) for name, w in model.state_dict().items()}
    torch.save({"rows": rows, "norms": norms, "weights": weights}, path)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder with what 2 processes left that trained the model together."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun("tests.test_training", folder)
    return folder


@VARIANT
@pytest.mark.parametrize("wrapper, rows", [("ddp", (15, 15)), ("fsdp", (8, 7))], ids=str)
def test_two_processes_train_as_one(two_processes, wrapper, rows, variant):
    model = make_tagger(variant)
    norms = train_tagger(model)
    assert norms.min() < CLIP_NORM < norms.max()
    for rank in (0, 1):
        left = torch.load(two_processes / f"{wrapper}-{variant}-{rank}.pt")
        assert left["rows"] == rows[rank]
        assert_close(left["norms"], norms, **ROUNDING)
        assert_close(left["weights"], dict(model.state_dict()), **ROUNDING)


@VARIANT
def test_one_process_loads_what_two_saved(two_processes, variant):
    model = make_tagger(variant, seed=1)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=two_processes / f"sharded-{variant}")
    model.load_state_dict(state["model"])
    left = torch.load(two_processes / f"fsdp-{variant}-0.pt")
    assert_close(dict(model.state_dict()), left["weights"], **EXACT)


@VARIANT
def test_a_model_on_meta_gets_what_the_first_process_has(two_processes, variant):
    for rank in (0, 1):
        kinds = "fsdp", "broadcast"
        left = [torch.load(two_processes / f"{kind}-{variant}-{rank}.pt") for kind in kinds]
        assert_close(*(each["weights"] for each in left), **EXACT)
        assert left[0]["rows"] == left[1]["rows"]


def test_perf_train_in_two_processes(tmp_path):
    settings = train.SETTINGS["cpu"]._replace(steps=3, H=8)
    train.run_training(torch.device("cpu"), "fp32", settings, tmp_path / "train.csv")
    options = ["--device", "cpu", "--steps", 3, "--hidden", 8, "--out", tmp_path / "two"]
    says = torchrun("perf", "train", *options)
    assert says.count("agrees with nn.GRU's") == says.count("wrote") == 1
    assert (tmp_path / "two" / "train.png").exists()
    one, two = (
        list(csv.DictReader(path.open(encoding="utf-8")))
        for path in (tmp_path / "train.csv", tmp_path / "two" / "train.csv")
    )
    assert [(r["run"], r["step"]) for r in two] == [(r["run"], r["step"]) for r in one]
    assert all(r["device"].endswith(", 2 processes") for r in two)
    for name in ("train_bpc", "heldout_bpc"):
        # float32: 8 bits/char rounds at 5e-7. Gradients of one's own rows alone made it 5e-3.
        losses = ([float(r[name]) for r in rows] for rows in (two, one))
        assert next(losses) == pytest.approx(next(losses), rel=0, abs=2e-5)


# Activations


@VARIANT
def test_activation_checkpointing(variant):
    layer = TriGRU(IN, H, num_layers=2, bidirectional=True, dropout=0.5, variant=variant)
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(T, B, IN, requires_grad=True)
    dy, dh_n = torch.randn(T, B, 2 * H), torch.randn(4, B, H)

    def gradients(function, seed):
        torch.manual_seed(seed)  # of dropout
        return torch.autograd.grad(function(x), [x, *layer.parameters()], (dy, dh_n))

    kept = gradients(layer, seed=1)
    assert len(calls) == 1
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False), seed=1)
    assert len(calls) == 3  # once more, in backward
    assert_close(again, kept, **EXACT)
    assert not gradients(layer, seed=2)[0].equal(kept[0])


# Optimisers


def fit(layer, optimiser, scaler=None, steps=5):
    """Train the layer on one batch; the losses."""
    x, targets = batch(0, layer.weight_ih_l0.dtype)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (layer(x)[0][..., :OUT] - targets).square().sum()
        if scaler is None:
            loss.backward()
            optimiser.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        losses.append(loss.item())
    return losses


def make_layer(variant, dtype=F64):
    torch.manual_seed(0)
    return TriGRU(IN, H, num_layers=2, bidirectional=True, variant=variant, dtype=dtype)


@VARIANT
def test_gradient_scaling(variant):
    scaled, plain = (make_layer(variant, torch.float32) for _ in range(2))
    before = [p.detach().clone() for p in scaled.parameters()]
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (scaled, plain))
    # float32's largest power of two: the gradients overflow, and the step is left out.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    fit(scaled, ours, scaler, steps=1)
    assert not all(p.grad.isfinite().all() for p in scaled.parameters())
    assert_close(list(scaled.parameters()), before, **EXACT)
    assert scaler.get_scale() == 2.0**126

    # A power of two is exact to multiply by and to divide by.
    scaler.update(2.0**10)
    losses = fit(scaled, ours, scaler)
    assert losses == fit(plain, theirs) and losses[-1] < losses[0]
    assert_close(list(scaled.parameters()), list(plain.parameters()), **EXACT)


@VARIANT
@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "Adam", "AdamW"])
def test_fused_optimisers(variant, kind):
    layers = fused, plain = [make_layer(variant) for _ in range(2)]
    optimiser = getattr(torch.optim, kind)
    losses = [
        fit(layer, optimiser(layer.parameters(), lr=0.01, fused=layer is fused)) for layer in layers
    ]
    assert_close(*losses, rtol=1e-12, atol=0)
    assert losses[0][-1] < losses[0][0]
    assert_close(list(fused.parameters()), list(plain.parameters()), **ROUNDING)


@VARIANT
@pytest.mark.parametrize("foreach", [False, True], ids=["", "foreach"])
def test_clipping(variant, foreach):
    layer = make_layer(variant)
    x, _ = batch(0)
    layer(x)[0].square().sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    norm = torch.cat([g.flatten() for g in before]).norm()
    for max_norm in (2 * norm.item(), norm.item() / 2):  # the larger one clips nothing
        assert_close(clip_grad_norm_(layer.parameters(), max_norm, foreach=foreach), norm)
        clipped = [p.grad for p in layer.parameters()]
        factor = min(1, max_norm / (norm + 1e-6))  # as clip_grad_norm_ says
        assert_close(clipped, [g * factor for g in before], **ROUNDING)


# Checkpoints


@VARIANT
def test_flat_checkpoints(variant):
    """As safetensors has them: tensors by name, which share nothing, and no metadata."""
    layer, x = make_layer(variant), torch.randn(T, B, IN, dtype=F64)
    state = layer.state_dict()
    assert len({v.untyped_storage().data_ptr() for v in state.values()}) == len(state)
    saved = {k: (v.shape, v.contiguous().numpy().tobytes()) for k, v in state.items()}
    loaded = {
        k: torch.frombuffer(bytearray(data), dtype=F64).view(shape)
        for k, (shape, data) in saved.items()
    }
    settings = {"num_layers": 2, "bidirectional": True, "dtype": F64}
    fresh = TriGRU(IN, H, **settings, variant=variant)
    assert not fresh(x)[0].equal(layer(x)[0])
    fresh.load_state_dict(loaded)
    assert_close(fresh(x), layer(x), **EXACT)
    # The names alone tell the variants apart: the textbook form has no bias_hh.
    (other,) = set(ops.VARIANTS) - {variant}
    refused = "Missing" if other == "torch" else "Unexpected"
    with pytest.raises(RuntimeError, match=rf'{refused} key\(s\) in state_dict: "bias_hh_l0"'):
        TriGRU(IN, H, **settings, variant=other).load_state_dict(loaded)


@VARIANT
def test_distributed_checkpoints(variant, tmp_path):
    """Training goes on from them as if it had not stopped."""

    def start(seed):
        model = make_tagger(variant, seed)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(model, optimiser, number):
        x, targets = batch(number)
        optimiser.zero_grad()
        (model(x) - targets).square().mean().backward()
        optimiser.step()

    model, optimiser = start(seed=0)
    for number in (0, 1):
        step(model, optimiser, number)
    weights, moments = get_state_dict(model, optimiser)
    dcp.save({"model": weights, "optimiser": moments}, checkpoint_id=tmp_path)

    resumed, its_optimiser = start(seed=1)
    weights, moments = get_state_dict(resumed, its_optimiser)
    dcp.load({"model": weights, "optimiser": moments}, checkpoint_id=tmp_path)  # in place
    set_state_dict(resumed, its_optimiser, model_state_dict=weights, optim_state_dict=moments)
    for number in (2, 3):
        step(model, optimiser, number)
        step(resumed, its_optimiser, number)
    assert_close(dict(resumed.state_dict()), dict(model.state_dict()), **EXACT)


if __name__ == "__main__":
    train_taggers(Path(sys.argv[1]))
