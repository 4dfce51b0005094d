"""What is compared: TriGRU, PyTorch's own GRU, plain loops of torch operations,
and other projects' layers where they are installed."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.backends.cudnn.rnn
from torch import Tensor, nn

import trigru
from trigru.launch import uses_tf32

from .shapes import Case, asks_cudnn, joined_by_peers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Weights = dict[str, Tensor]  # by nn.GRU's names
Layer = Callable[[Any, Tensor], tuple[Any, Tensor]]  # x, h0 → y, h_n; x and y may be packed


class NoKernel(RuntimeError):
    """A provider has no kernel for a case, or is not asked for it, and would measure another's."""


class Provider(NamedTuple):
    """A layer that is ready to be called, and the parameters to differentiate it in."""

    layer: Layer
    parameters: list[Tensor]
    cudnn: bool = False  # whether it is cuDNN that runs it, which can be switched off
    no_graph: str = ""  # why no graph of it can be captured, if none can


Build = Callable[[Case, Weights, bool], Provider]  # the last: whether in training mode


def builders(case: Case, device: torch.device) -> dict[str, Build]:
    """The providers of a case by name, the yardstick first."""
    build: dict[str, Build] = {"trigru": build_trigru}
    if case.variant == "torch":
        build = {"cudnn" if device.type == "cuda" else "aten": build_torch} | build
    else:
        build = {"eager": build_eager} | build
    if joined_by_peers(case):
        build["eager"] = build_eager
        if case.variant == "torch":
            peers = {"flashrnn": build_flashrnn, "torchrl": build_torchrl}
            build |= {name: peer for name, peer in peers.items() if find_spec(name)}
        build["compiled"] = build_compiled
    if asks_cudnn(case) and device.type == "cuda":
        from .cudnn import build_persistent  # which takes from here what providers share

        build["persistent"] = build_persistent
    return build


def build_trigru(case: Case, weights: Weights, training: bool) -> Provider:
    """trigru.TriGRU. Raises NoKernel on a GPU where none of its kernels fits."""
    like = weights["weight_hh_l0"]
    if like.device.type == "cuda":
        textbook = case.variant == "textbook"
        reason = trigru.ops.why_no_kernel(like.device, like.dtype, case.H, textbook)
        if reason is not None:
            raise NoKernel(reason)
    layer = trigru.TriGRU(
        case.I, case.H, case.layers, bidirectional=case.directions == 2,
        device=like.device, dtype=like.dtype, variant=case.variant,
    )  # fmt: skip
    return _loaded(layer, weights, training)


def build_torch(case: Case, weights: Weights, training: bool) -> Provider:
    """torch.nn.GRU, its weights in the one piece that cuDNN wants."""
    like = weights["weight_hh_l0"]
    layer = nn.GRU(
        case.I, case.H, case.layers, bidirectional=case.directions == 2,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    provider = _loaded(layer, weights, training)
    flatten(layer)
    return provider._replace(cudnn=like.is_cuda)


def without_cudnn(provider: Provider) -> Provider:
    """The same while cuDNN is off: ATen's own GRU, whose backward pass then is ATen's, too."""

    def layer(x: Any, h0: Tensor) -> tuple[Any, Tensor]:
        with trigru.ops.without_cudnn():
            return provider.layer(x, h0)

    return provider._replace(layer=layer, cudnn=False)


def build_eager(case: Case, weights: Weights, training: bool) -> Provider:
    """The case's equation as a loop of torch operations."""
    return _build_loop(case, weights, CELLS[case.variant])


def build_compiled(case: Case, weights: Weights, training: bool) -> Provider:
    """The same loop over a step that torch.compile has fused."""
    torch._dynamo.reset()  # or many shapes would be taken for one that varies
    return _build_loop(case, weights, torch.compile(CELLS[case.variant], dynamic=False))


def torch_cell(gx: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor) -> Tensor:
    """One step of nn.GRU's equation: gx (B, 3H), h (B, H) → h' (B, H)."""
    H = h.shape[-1]
    gh = torch.addmm(b_hh, h, w_hh.t())
    r, z = torch.sigmoid(gx[:, : 2 * H] + gh[:, : 2 * H]).chunk(2, dim=-1)
    n = torch.tanh(torch.addcmul(gx[:, 2 * H :], r, gh[:, 2 * H :]))
    return torch.lerp(n, h, z)  # (1 − z) ⊙ n + z ⊙ h


def textbook_cell(gx: Tensor, h: Tensor, w_hh: Tensor) -> Tensor:
    """One step of the textbook equation: gx (B, 3H), h (B, H) → h' (B, H)."""
    H = h.shape[-1]
    rz = torch.addmm(gx[:, : 2 * H], h, w_hh[: 2 * H].t())
    r, z = torch.sigmoid(rz).chunk(2, dim=-1)
    n = torch.tanh(torch.addmm(gx[:, 2 * H :], r * h, w_hh[2 * H :].t()))
    return torch.lerp(h, n, z)  # (1 − z) ⊙ h + z ⊙ n


CELLS: dict[str, Callable[..., Tensor]] = {"torch": torch_cell, "textbook": textbook_cell}


def _build_loop(case: Case, weights: Weights, cell: Callable[..., Tensor]) -> Provider:
    """Layers and directions of loops over `cell`, each after one product for all its inputs: what
    a person would write who wants it to be fast."""
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}

    def walk(x: Tensor, h: Tensor, suffix: str) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, *b_hh = (w for name, w in leaves.items() if name.endswith(suffix))
        y = []
        for gx in nn.functional.linear(x, w_ih, b_ih).unbind(0):
            h = cell(gx, h, w_hh, *b_hh)
            y.append(h)
        return torch.stack(y), h

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        h_n: list[Tensor] = []
        for i in range(case.layers):
            y, h = walk(x, h0[len(h_n)], f"_l{i}")
            h_n.append(h)
            if case.directions == 2:
                y_reverse, h = walk(x.flip(0), h0[len(h_n)], f"_l{i}_reverse")
                h_n.append(h)
                y = torch.cat((y, y_reverse.flip(0)), dim=-1)
            x = y
        return x, torch.stack(h_n)

    return Provider(layer, list(leaves.values()))


def flatten(layer: nn.GRU) -> None:
    """Lay the weights out in one piece, so that cuDNN need not copy them at every call.

    nn.GRU does so itself, but not in bfloat16, which its list of cuDNN's dtypes lacks."""
    layer.flatten_parameters()
    weights: Any = layer._flat_weights
    if weights[0].is_cuda and weights[0].dtype == torch.bfloat16:
        with torch.no_grad(), torch.cuda.device_of(weights[0]):
            torch._cudnn_rnn_flatten_weight(
                weights, len(layer._all_weights[0]), layer.input_size,
                torch.backends.cudnn.rnn.get_cudnn_mode("GRU"), layer.hidden_size, 0,
                layer.num_layers, layer.batch_first, layer.bidirectional,
            )  # fmt: skip


def _loaded(layer: nn.Module, weights: Weights, training: bool) -> Provider:
    layer.load_state_dict(weights)
    parameters = dict(layer.named_parameters())
    return Provider(layer.train(training), [parameters[name] for name in weights])


# Other projects' layers

TORCHRL_TRAINING_H = 256  # beyond, tuning its backward kernel takes ten minutes a shape and more


def build_flashrnn(case: Case, weights: Weights, training: bool) -> Provider:
    """One layer of FlashRNN (PyPI's flashrnn 1.0). Its GRU is a cuBLAS product and a kernel for
    every step, compiled by nvcc once for each dtype. It synchronises around each call."""
    from flashrnn import FlashRNNConfig, flashrnn

    leaves = [w.detach().clone().requires_grad_() for w in weights.values()]
    w_ih, w_hh, b_ih, b_hh = leaves
    config = FlashRNNConfig(  # it reads the sizes off the tensors; others here would compile anew
        backend="cuda" if w_hh.is_cuda else "vanilla", function="gru", head_dim=64, batch_size=8,
        dtype=str(w_hh.dtype).removeprefix("torch."), input_shape="TBGHD", output_shape="STBHD",
    )  # fmt: skip

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        gx = nn.functional.linear(x, w_ih).unflatten(-1, (3, 1, case.H))  # of r, z and n
        u = w_hh.view(3, 1, case.H, case.H)[[2, 0, 1]]  # of n, r and z
        (i_r, i_z, i_n), (h_r, h_z, h_n) = b_ih.chunk(3), b_hh.chunk(3)
        b = torch.stack((h_n, i_r + h_r, i_z + h_z, i_n)).unsqueeze(1)
        y, last = flashrnn(gx, u, b, states=h0[:, None, :, None], config=config)
        return y[0, :, :, 0], last[0, :, :, 0]

    return Provider(layer, leaves, no_graph="it synchronises")


def build_torchrl(case: Case, weights: Weights, training: bool) -> Provider:
    """One layer of TorchRL's Triton GRU (0.14) without its TensorDicts. Its tensors are float32 and
    batch-first; only its recurrent products have the case's dtype."""
    from torchrl.modules.tensordict_module import _rnn_triton as rnn

    if training and case.H > TORCHRL_TRAINING_H:
        raise RuntimeError(f"not tuned for training at H beyond {TORCHRL_TRAINING_H}")
    rnn._maybe_enable_tf32 = lambda precision: None  # whose switch clashes with PyTorch's new one
    for kernel in (rnn._gru_fwd_kernel, rnn._gru_bwd_kernel):
        kernel.cache.clear()  # or what was tuned for one batch size would run for all
    leaves = [w.detach().clone().requires_grad_() for w in weights.values()]
    like = weights["weight_hh_l0"]
    resets = torch.zeros(case.B, case.T, dtype=torch.bool, device=like.device)
    precision = "tf32" if uses_tf32(like.device) else "ieee"

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        start = nn.functional.pad(h0.transpose(0, 1), (0, 0, 0, case.T - 1))  # (B, T, H)
        y, h_n = rnn.gru_triton(
            x.transpose(0, 1).float().contiguous(), start.float(), *(w.float() for w in leaves),
            resets, compute_dtype=like.dtype, input_precision=precision,
        )  # fmt: skip
        return y.transpose(0, 1).to(x.dtype), h_n.unsqueeze(0).to(x.dtype)

    return Provider(layer, leaves)
