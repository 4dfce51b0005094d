"""`TriGRU`, the layer that stands where `torch.nn.GRU` stands."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import ops


class TriGRU(nn.RNNBase):
    r"""A multi-layer GRU with `torch.nn.GRU`'s constructor, parameters, shapes and results.

    On a CUDA device each layer's recurrence is one launch of a persistent Triton kernel, both
    directions together where they fit. `variant` chooses the equation, with r and z as in either::

        "torch"     n = tanh(W_n x + b_in + r ⊙ (U_n h + b_hn))    h' = (1 − z) ⊙ n + z ⊙ h
        "textbook"  n = tanh(W_n x + U_n (r ⊙ h) + b_n)            h' = (1 − z) ⊙ h + z ⊙ n

    "torch" is nn.GRU's own, with its two biases; checkpoints load either way. "textbook" is that of
    Chung et al. 2014 (arXiv:1412.3555) with one bias per gate, `bias_ih_l*`, and the opposite sign
    of z.

    Args:
        input_size: I, the size of x.
        hidden_size: H, the size of the state.
        num_layers: layers on top of each other, each reading the output of the one below.
        bias: whether the gates have biases.
        batch_first: whether input and output are (B, T, …) rather than (T, B, …).
        dropout: probability of dropout on each layer's output but the last's, in training.
        bidirectional: whether each layer also walks backwards in time.
        device, dtype: of the parameters.
        variant: "torch" or "textbook".

    Input: (T, B, I), or (B, T, I) with batch_first, or (T, I) without a batch; and optionally hx
    (layers · directions, B, H), or (layers · directions, H) without a batch, 0 if left out.

    Output: (T, B, directions · H), laid out as the input is, and h_n, as hx. Under autocast both
    have autocast's dtype.

    Raises what nn.GRU raises for the same wrong arguments; ValueError on an unknown variant;
    NotImplementedError on a PackedSequence.
    """

    variant: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        variant: str = "torch",
    ) -> None:
        if variant not in ops.VARIANTS:
            raise ValueError(f"variant must be one of {ops.VARIANTS}, got {variant!r}")
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.variant = variant
        if variant == "textbook" and bias:
            for name in [n for n in self._flat_weights_names if n.startswith("bias_hh")]:
                delattr(self, name)
            self._all_weights = [
                [n for n in names if not n.startswith("bias_hh")] for names in self._all_weights
            ]
            self._flat_weights_names = [n for names in self._all_weights for n in names]
            self._init_flat_weights()

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take each weight where it is, cuDNN's layout is not needed."""

    def extra_repr(self) -> str:
        variant = "" if self.variant == "torch" else f", variant={self.variant!r}"
        return super().extra_repr() + variant

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class."""
        if isinstance(input, PackedSequence):
            raise NotImplementedError(
                "TriGRU does not take a PackedSequence yet; use nn.GRU for it"
            )
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor"
            )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else hx.unsqueeze(1)
        if hx is None:
            layers = self.num_layers * (2 if self.bidirectional else 1)
            hx = input.new_zeros(layers, input.shape[batch_dim], self.hidden_size)
        self._update_flat_weights()  # what functional_call has put in place
        self.check_forward_args(input, hx, None)
        if input.shape[1 - batch_dim] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

        output, h_n = self._run(input, hx)
        if not batched:
            output, h_n = output.squeeze(batch_dim), h_n.squeeze(1)
        return output, h_n

    def _run(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        input, hx, *weights = ops.autocast(input, hx, *self._flat_weights)
        textbook, dtype = self.variant == "textbook", input.dtype
        # Where no kernel runs, PyTorch's own GRU is the fastest that is there. A compiled graph
        # keeps the one operator per layer instead, which does not unroll with T.
        if not (textbook or torch.compiler.is_compiling()) and ops.why_no_kernel(
            input.device, dtype, self.hidden_size, textbook
        ):
            ops.warn_of_fallback(input.device, dtype, self.hidden_size, textbook)
            return torch.gru(
                input, hx, weights, self.bias, self.num_layers, self.dropout, self.training,
                self.bidirectional, self.batch_first,
            )  # fmt: skip

        x = input.transpose(0, 1) if self.batch_first else input  # (T, B, I)
        T, B, _ = x.shape
        D, H = 2 if self.bidirectional else 1, self.hidden_size
        h_n = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            w = self._layer_weights(weights, layer)
            b_ih = w.get("bias_ih")
            gx = F.linear(x, w["weight_ih"].flatten(0, 1), None if b_ih is None else b_ih.flatten())
            y, h = ops.recurrence(
                gx.view(T, B, D, 3 * H), hx[layer * D : (layer + 1) * D], w["weight_hh"],
                w.get("bias_hh"), textbook=textbook,
            )  # fmt: skip
            x = y.flatten(2)
            h_n.append(h)
        output = x.transpose(0, 1) if self.batch_first else x
        return output, h_n[0] if len(h_n) == 1 else torch.cat(h_n)

    def _layer_weights(self, weights: list[Tensor], layer: int) -> dict[str, Tensor]:
        """One layer's weights by kind, those of its directions stacked: (D, 3H, …)."""
        D = 2 if self.bidirectional else 1
        kinds = len(self._all_weights[0])
        stacked = {}
        for kind, name in enumerate(self._all_weights[0]):
            each = [weights[(layer * D + d) * kinds + kind] for d in range(D)]
            stacked[name.removesuffix("_l0")] = (
                each[0].unsqueeze(0) if D == 1 else torch.stack(each)
            )
        return stacked

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["variant"] = self.variant

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict, strict: bool, missing_keys: list,
        unexpected_keys: list, error_msgs: list,
    ) -> None:  # fmt: skip
        # Metadata without a variant is that of an nn.GRU; without metadata, the names must do.
        variant = local_metadata.get("variant", "torch") if local_metadata else self.variant
        if variant != self.variant:
            error_msgs.append(
                f"the checkpoint of {prefix[:-1] or 'this layer'!r} is of variant {variant!r}, the "
                f"layer of variant {self.variant!r}: the same weights mean another function"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @classmethod
    def from_torch(cls, gru: nn.GRU) -> "TriGRU":
        """A TriGRU that computes what `gru` computes and shares its parameters.

        Raises TypeError if `gru` is no nn.GRU, or pruned or parametrised."""
        if not isinstance(gru, nn.GRU):
            raise TypeError(f"expected an nn.GRU, got {type(gru).__name__}")
        return _convert(gru, cls)

    def to_torch(self) -> nn.GRU:
        """An nn.GRU that computes what this layer computes and shares its parameters.

        Raises ValueError for the textbook variant, which nn.GRU cannot compute."""
        if self.variant != "torch":
            raise ValueError(f"nn.GRU cannot compute the {self.variant} variant")
        return _convert(self, nn.GRU)


def _convert(source: Any, target: Any) -> Any:
    """`source`, an nn.GRU or a TriGRU, as the other class, with the same Parameter objects."""
    layer = target(
        source.input_size, source.hidden_size, source.num_layers, source.bias, source.batch_first,
        source.dropout, source.bidirectional, device="meta",
    )  # fmt: skip
    for name in source._flat_weights_names:
        parameter = getattr(source, name)
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(
                f"{name} must be a parameter, got a {type(parameter).__name__}: take pruning or "
                "parametrisation off the layer first"
            )
        setattr(layer, name, parameter)
    layer._init_flat_weights()
    return layer.train(source.training)


def replace_gru(model: nn.Module) -> int:
    """Put a TriGRU with the same parameters where `model` holds an nn.GRU, however deep.

    Optimisers that hold the parameters go on working. A layer that is used in several places is
    replaced by one TriGRU in all of them. Subclasses of nn.GRU are left alone, for what they change
    is not known. Hooks on a layer are not carried over.

    Returns how many layers were replaced. Raises ValueError if `model` itself is an nn.GRU, which
    nothing holds: use `TriGRU.from_torch` for it; TypeError if a layer's weights are not its
    parameters, as under pruning, before anything is replaced."""
    if type(model) is nn.GRU:
        raise ValueError("the model itself is an nn.GRU: use TriGRU.from_torch(model)")
    replaced = {m: TriGRU.from_torch(m) for m in model.modules() if type(m) is nn.GRU}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    return len(replaced)
