"""`TriGRU`, the layer that stands where `torch.nn.GRU` stands."""

import copy
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from . import onnx, ops
from .derivatives import forward_mode


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
        heads: n recurrences side by side in each direction, each of its own H / n units: U has n
            blocks. `weight_hh_l*` are (n, 3H / n, H / n): block k is units k H / n and on, its rows
            the gates r, z, n of these. All else is as with one; x reaches all units.
        learn_reset: whether there is a parameter `reset_state` (layers · directions, H), from 0 on:
            the state of a reset, and hx where it is left out.
        clip: h' is limited to ± this before anything uses it (LFADS), with no gradient where it
            gets there; None for no limit.
        save: what a layer keeps for its backward: "gates", its input, y and 3 or 4 activations of
            y's size (textbook or torch form); or "state", its input and y alone. The backward then
            makes the others again, by products over all steps at once. Compiled functions, traces
            and torch.func take the ordinary way: a compiler chooses itself what it keeps. Where no
            kernel runs, PyTorch's own GRU, which keeps more, gives way to a slower loop.

    Input: (T, B, I), or (B, T, I) with batch_first, or (T, I) without a batch, or a PackedSequence;
    and optionally hx (layers · directions, B, H), or (layers · directions, H) without a batch, 0 or
    the reset state if left out. And, by name:

        resets: bool, as the input without its last dimension: (T, B), (B, T), (T,). Where true, the
            state that enters the step in each layer is 0 or `reset_state`; nothing of what lies
            before it in the walk, and no gradient, gets past. A second direction enters a step from
            behind; for resets of its own, give (T, B, 2).
        update_scale: as resets, or with H behind: (T, B) or (T, B, H). The candidate's share of h'
            is multiplied by it in each layer and direction: z of the textbook form, 1 − z of the
            torch form (AUGRU in DIEN; a mask of zoneout).

    For a PackedSequence they are packed likewise, or the data of what is: (N,).

    Output: (T, B, directions · H), laid out as the input is, or packed as it is, and h_n, as hx.
    Under autocast both have autocast's dtype. Of a packed sequence only its own steps are computed,
    in the same single launch, and h_n is the state after its own last step (backwards: its first).

    Raises what nn.GRU raises for the same wrong arguments; ValueError on an unknown variant, heads
    that do not divide H, a clip that is not above 0, and resets and update_scales of other shapes
    or on another device; TypeError on those of another dtype.
    """

    # What nn.GRU does not have, as it is there; and in files from before there was more.
    variant: str = "torch"
    heads: int = 1
    learn_reset: bool = False
    clip: float | None = None
    save: str = "gates"

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
        heads: int = 1,
        learn_reset: bool = False,
        clip: float | None = None,
        save: str = "gates",
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if variant not in ops.VARIANTS:
            raise ValueError(f"variant must be one of {ops.VARIANTS}, got {variant!r}")
        if not isinstance(heads, int) or isinstance(heads, bool):
            raise TypeError(f"heads must be an int, got {type(heads).__name__}")
        if heads < 1 or (isinstance(hidden_size, int) and hidden_size % heads):
            raise ValueError(f"heads must divide hidden_size {hidden_size}, got {heads}")
        if not isinstance(learn_reset, bool):
            raise TypeError(f"learn_reset must be a bool, got {type(learn_reset).__name__}")
        ops.check_clip(clip)
        if save not in ("gates", "state"):
            raise ValueError(f"save must be 'gates' or 'state', got {save!r}")
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, **kwargs,
        )  # fmt: skip
        self.variant, self.heads, self.learn_reset, self.clip = variant, heads, learn_reset, clip
        self.save = save
        if heads > 1:
            for name in [n for n in self._flat_weights_names if n.startswith("weight_hh")]:
                weight = getattr(self, name)
                blocks = weight.new_empty(heads, 3 * hidden_size // heads, hidden_size // heads)
                setattr(self, name, nn.Parameter(blocks))
                self._reset_blocks(blocks)
        if learn_reset:
            count = num_layers * (2 if bidirectional else 1)
            self.reset_state = nn.Parameter(self._flat_weights[0].new_zeros(count, hidden_size))
        if variant == "textbook" and bias:
            for name in [n for n in self._flat_weights_names if n.startswith("bias_hh")]:
                delattr(self, name)
            self._all_weights = [
                [n for n in names if not n.startswith("bias_hh")] for names in self._all_weights
            ]
            self._flat_weights_names = [n for names in self._all_weights for n in names]
            self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Draw all weights anew, as nn.GRU does, U's blocks as those of a GRU of their size; the
        learned reset state is 0 again."""
        super().reset_parameters()
        if self.heads > 1:
            for name in [n for n in self._flat_weights_names if n.startswith("weight_hh")]:
                self._reset_blocks(getattr(self, name))
        if self.learn_reset:
            nn.init.zeros_(self.reset_state)

    @staticmethod
    def _reset_blocks(blocks: Tensor) -> None:
        bound = blocks.shape[-1] ** -0.5
        nn.init.uniform_(blocks, -bound, bound)

    @property
    def _flat_weights(self) -> list[Any]:
        """The weights of now, as torch.gru takes them. nn.RNNBase keeps a list, and finds by weak
        references whether it is still right: compiled, it fails where one has died meanwhile."""
        parameters = self._parameters  # where most are, quickly found
        return [
            parameters[name] if name in parameters else getattr(self, name, None)
            for name in self._flat_weights_names
        ]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """nn.RNNBase's list is not kept."""

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take each weight where it is, cuDNN's layout is not needed."""

    def extra_repr(self) -> str:
        given = {
            name: getattr(self, name)
            for name in ("variant", "heads", "learn_reset", "clip", "save")
            if getattr(self, name) != getattr(TriGRU, name)
        }
        return super().extra_repr() + "".join(f", {k}={v!r}" for k, v in given.items())

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *by_position: Any,
        resets: Tensor | PackedSequence | None = None,
        update_scale: Tensor | PackedSequence | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """See the class."""
        if any(isinstance(each, fx.Proxy) for each in (input, hx, resets, update_scale)):
            return self._call_in_graph(input, hx, resets=resets, update_scale=update_scale)
        if by_position:
            # torch.onnx.export(…, dynamo=False) gives by position what is by name alone.
            if len(by_position) != 2 or not onnx.exporting():
                raise TypeError(
                    "TriGRU.forward() takes from 2 to 3 positional arguments but "
                    f"{3 + len(by_position)} were given"
                )
            resets, update_scale = by_position
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, resets, update_scale)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor"
            )
        batch_dim = 0 if self.batch_first else 1
        modifiers: Any = self._modifiers(input, resets, update_scale)
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else hx.unsqueeze(1)
            modifiers = tuple(None if m is None else m.unsqueeze(batch_dim) for m in modifiers)
        hx = self._checked_sizes(input, hx, None)
        output, h_n = self._run(input, hx, None, *modifiers)
        if not batched:
            output, h_n = output.squeeze(batch_dim), h_n.squeeze(1)
        return output, h_n

    def step(self, x_t: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of all layers with the least work on the host, for control loops and samplers.

        x_t is (B, I), or (I,) without a batch; hx as the layer's, (layers, B, H) or (layers, H), 0
        or the reset state if left out. Returns the output (B, H) or (H,), and hx for the next step.
        It is what the layer computes for a sequence of one step, dropout, autocast and gradients
        included; no hooks run. Where an episode begins, its part of hx is the caller's to reset:
        `hx.masked_fill(begins.unsqueeze(-1), 0)`. In 16 bits each step rounds the state. The torch
        form without heads and clip is `torch.gru_cell`'s, on CUDA, too.

        On CUDA such a call is the host's work above all. A graph does without that, over tensors
        that stay where they are::

            x, hx = torch.zeros(B, I, device="cuda"), torch.zeros(layers, B, H, device="cuda")
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad():
                layer.step(x, hx)  # what only the first call makes cannot be in a graph
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    y, h_n = layer.step(x, hx)
                    hx.copy_(h_n)
            x.copy_(observation)
            graph.replay()  # y is the output, hx the state after it

        Raises ValueError for a bidirectional layer and for an x_t of other dimensions; else what
        the layer raises."""
        if self.bidirectional:
            raise ValueError(
                "a bidirectional layer has no steps: its second direction begins at the end of the "
                "sequence"
            )
        ops.expect_tensor("x_t", x_t)
        if hx is not None:
            ops.expect_tensor("hx", hx)
        batched = x_t.dim() == 2
        if not batched and x_t.dim() != 1:
            raise ValueError(f"GRU: Expected x_t to be 1D or 2D, got {x_t.dim()}D instead")
        output: Any
        if not batched and (hx is None or hx.dim() == 2):
            output, h_n = self.step(x_t.unsqueeze(0), None if hx is None else hx.unsqueeze(1))
            return output.squeeze(0), h_n.squeeze(1)
        if hx is None:
            shape = self.num_layers, len(x_t), self.hidden_size
            zeros = not self.learn_reset
            hx = x_t.new_zeros(shape) if zeros else self.reset_state.unsqueeze(1).expand(shape)
        if batched and self._is_of_cells(x_t, hx):
            return self._step_of_cells(x_t, hx)
        time = 1 if batched and self.batch_first else 0
        output, h_n = self.forward(x_t.unsqueeze(time), hx)  # which says what may be wrong
        return output.squeeze(time), h_n

    def _is_of_cells(self, x: Tensor, hx: Tensor) -> bool:
        """Whether a step from x (B, I) is `torch.gru_cell`'s in each layer. That of CUDA knows no
        compiler, no vmap and no forward-mode AD. (Beside a cell's time each call here is seen.)"""
        return (
            hx.shape == (self.num_layers, x.shape[0], self.hidden_size)
            and self.variant == "torch"
            and self.heads == 1
            and self.clip is None
            and not (torch.compiler.is_compiling() or ops.transformed() or forward_mode())
            and not ops.autocasts(x.device.type)
        )

    def _step_of_cells(self, x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        weights, kinds = self._flat_weights, len(self._all_weights[0])
        states = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            of_layer = weights[layer * kinds : (layer + 1) * kinds]
            x = torch.gru_cell(x, hx[layer], *of_layer)
            states.append(x)
        return x, torch.stack(states)

    def _modifiers(self, input: Tensor, resets: Any, update_scale: Any) -> tuple[Any, Any]:
        """resets and update_scale as `ops.recurrence` takes them, but laid out as the input is."""
        return ops.per_recurrence(
            resets, update_scale, input.shape[:-1], input.device, self.hidden_size,
            2 if self.bidirectional else 1, self.heads,
        )  # fmt: skip

    def _call_in_graph(self, input: Any, hx: Any, **modifiers: Any) -> Any:
        """A call of this layer in the graph that torch.fx is tracing, as there is for an nn.GRU:
        a leaf, which is not traced itself."""
        modifiers = {name: value for name, value in modifiers.items() if value is not None}
        proxies = [p for p in (input, hx, *modifiers.values()) if isinstance(p, fx.Proxy)]
        tracer = proxies[0].tracer
        path = tracer.path_of_module(self) if isinstance(tracer, fx.Tracer) else ""
        if not path:
            raise fx.proxy.TraceError("torch.fx traces models with a TriGRU inside, not one itself")
        # Hooks and a subclass have run on what stands for tensors by now; the graph runs them, too.
        own = self._forward_hooks or self._forward_pre_hooks or self._is_full_backward_hook is False
        if own or "forward" in vars(self) or type(self).forward is not TriGRU.forward:
            raise fx.proxy.TraceError(
                f"torch.fx would run the hooks of the TriGRU {path!r} twice, pruning included, or "
                "its own forward; trace with an is_leaf_module that is true for TriGRU"
            )
        args = (input,) if hx is None else (input, hx)
        return tracer.create_proxy("call_module", path, args, modifiers)

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None, resets: Any, update_scale: Any
    ) -> tuple[PackedSequence, Tensor]:
        if onnx.exporting():
            raise NotImplementedError("TriGRU exports no PackedSequence to ONNX; pad the input")
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        hx = self._checked_sizes(data, hx, batch_sizes)
        modifiers = self._modifiers(
            data, _rows_of(packed, "resets", resets), _rows_of(packed, "update_scale", update_scale)
        )
        output, h_n = self._run(data, hx, batch_sizes, *modifiers)
        return (
            PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices),
            self.permute_hidden(h_n, unsorted_indices),
        )

    def _checked_sizes(
        self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None
    ) -> Tensor:
        """Refuse what nn.GRU itself refuses; returns hx or, if None, zeros or the reset state."""
        if hx is None:
            shape: Any = self.get_expected_hidden_size(input, batch_sizes)
            if batch_sizes is not None and torch.jit.is_tracing():
                # In a trace a number would be that of the example for ever.
                shape = shape[0], batch_sizes[0], shape[2]
            if self.learn_reset:
                if isinstance(self.reset_state, ExpandedWeight):
                    raise NotImplementedError(_NO_EXPANDED_WEIGHTS)
                hx = self.reset_state.unsqueeze(1).expand(shape)
            else:
                hx = input.new_zeros(shape)
        self.check_forward_args(input, hx, batch_sizes)
        return hx

    def _check_tensors(
        self, input: Tensor, hx: Tensor, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Refuse what PyTorch's operators under nn.GRU refuse, in their words where they are clear:
        a kernel would read and write wherever it is told to."""
        named = [("hidden", hx), *(("parameter", w) for w in weights)]
        for name, tensor in named:
            if tensor.device != input.device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at "
                    f"{input.device} and {name} tensor at {tensor.device}"
                )
        if batch_sizes is None and input.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        for name, tensor in named:
            if tensor.dtype != input.dtype:
                ours, theirs = (t.type().split(".")[-1][: -len("Tensor")] for t in (input, tensor))
                raise RuntimeError(
                    f"Input and {name} tensors are not the same dtype, found input tensor with "
                    f"{ours} and {name} tensor with {theirs}"
                )
        if batch_sizes is not None and (
            batch_sizes.dtype != torch.int64
            or int(batch_sizes[-1]) < 1
            or bool((batch_sizes.diff() > 0).any())
            or int(batch_sizes.sum()) != len(input)
        ):
            raise RuntimeError(
                "batch_sizes must be of int64, at least 1, never grow, and sum up to the "
                f"{len(input)} rows of the data, got {batch_sizes}"
            )

    def _run(
        self,
        input: Tensor,
        hx: Tensor,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        update_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """resets: (…, D) and update_scale: (…, D, H / heads), laid out as the input is."""
        weights: list[Any]
        reset_state = self.reset_state if self.learn_reset else None
        input, hx, reset_state, update_scale, *weights = ops.autocast(
            input, hx, reset_state, update_scale, *self._flat_weights
        )
        textbook, dtype, heads = self.variant == "textbook", input.dtype, self.heads
        plain = resets is None and update_scale is None and self.clip is None
        per_sample = has_torch_function(weights) and any(type(w) is ExpandedWeight for w in weights)
        if per_sample and (textbook or heads > 1 or self.learn_reset or not plain):
            raise NotImplementedError(_NO_EXPANDED_WEIGHTS)
        lean = self.save == "state" and ops.keeps_a_graph(
            input, hx, reset_state, update_scale, *weights
        )
        # Where no kernel runs, PyTorch's own GRU is the fastest that is there. A compiled graph
        # keeps the one operator per layer instead, which does not unroll with T.
        if per_sample or (
            plain
            and not (lean or textbook or torch.compiler.is_compiling() or ops.transformed())
            and ops.why_no_kernel(input.device, dtype, self.hidden_size // heads, textbook)
        ):
            if not per_sample:
                ops.warn_of_fallback(input.device, dtype, self.hidden_size // heads, textbook)
            weights = self._dense(weights)
            how = self.bias, self.num_layers, self.dropout, self.training, self.bidirectional
            with ops.without_cudnn() if input.is_cuda else nullcontext():
                if batch_sizes is None:
                    return torch.gru(input, hx, weights, *how, self.batch_first)
                return torch.gru(input, batch_sizes, hx, weights, *how)

        self._check_tensors(input, hx, weights, batch_sizes)
        if update_scale is not None and update_scale.dtype != input.dtype:
            raise TypeError(
                f"update_scale must be of {input.dtype}, as the input is, got {update_scale.dtype}"
            )
        if onnx.exporting():
            if not plain:
                raise NotImplementedError(
                    "an ONNX GRU node has no resets, no update_scale and no clip"
                )
            weights = self._dense(weights)
        x, offsets = input, None
        if batch_sizes is not None:  # (N, I), a row for every step of every sequence
            if (
                input.is_cuda
                and not torch.compiler.is_compiling()
                and torch.cuda.is_current_stream_capturing()
            ):
                raise RuntimeError(
                    "a CUDA graph cannot hold a PackedSequence, whose lengths are on the host; "
                    "give the layer padded input"
                )
            if torch.jit.is_tracing():  # no check is in the graph, but these sizes are
                N, B = batch_sizes.sum(), batch_sizes[0]  # which a trace takes for numbers
                x = x.reshape(N, self.input_size)  # type: ignore[call-overload]
                hx = hx.reshape(len(hx), B, self.hidden_size)  # type: ignore[call-overload]
            offsets = F.pad(batch_sizes.cumsum(0), (1, 0)).to(input.device, non_blocking=True)
        elif self.batch_first:  # (T, B, …)
            x = input.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
            update_scale = None if update_scale is None else update_scale.transpose(0, 1)
        D = 2 if self.bidirectional else 1
        h_n = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = F.dropout(x, self.dropout, self.training)
            w, h0 = self._layer_weights(weights, layer), hx[layer * D : (layer + 1) * D]
            if onnx.exporting():
                x, h = onnx.gru_node(x, h0, list(w.values()), textbook=textbook)
                h_n.append(h)
                continue
            reset = None
            if resets is not None and reset_state is not None:
                reset = reset_state[layer * D : (layer + 1) * D]
            x, h = self._run_layer(x, h0, w, offsets, resets, reset, update_scale, lean)
            h_n.append(h)
        output = x.transpose(0, 1) if self.batch_first and batch_sizes is None else x
        return output, h_n[0] if len(h_n) == 1 else torch.cat(h_n)

    def _run_layer(
        self, x: Tensor, h0: Tensor, weights: dict[str, Tensor], offsets: Tensor | None,
        resets: Tensor | None, reset_state: Any, update_scale: Tensor | None, lean: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x (T, B, I) or (N, I), h0 (D, B, H) → y (T, B, D · H) or (N, D · H), h_n (D, B, H).

        lean: keep x and y for the backward, and no gates."""
        D, heads = len(h0), self.heads
        kinds: list[Any] = [weights.get(kind) for kind in _KINDS]
        w_ih, w_hh, b_ih, b_hh = kinds
        if heads > 1:  # (D, …) as (D heads, …), a head's gates together
            w_ih, b_ih, b_hh = (_gates_of_heads(t, heads) for t in (w_ih, b_ih, b_hh))
            w_hh = w_hh.flatten(0, 1)
            h0 = h0.unflatten(-1, (heads, -1)).movedim(2, 1).flatten(0, 1)
            reset_state = None if reset_state is None else reset_state.reshape(D * heads, -1)
        made_of = x, w_ih.flatten(0, 1), None if b_ih is None else b_ih.flatten()
        with torch.no_grad() if lean else nullcontext():
            gx = F.linear(*made_of)
        y, h_n = ops.recurrence(
            gx.unflatten(-1, (D * heads, -1)), h0, w_hh, b_hh, offsets, resets, reset_state,
            update_scale, textbook=self.variant == "textbook", heads=heads, clip=self.clip,
            made_of=made_of if lean else None,
        )  # fmt: skip
        if heads > 1:
            h_n = h_n.unflatten(0, (D, heads)).movedim(1, 2).flatten(2)
        return y.flatten(-2), h_n

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

    def _dense(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights of a layer of one head that computes the same: 0 outside U's blocks."""
        return [
            dense_blocks(w) if name.startswith("weight_hh") and self.heads > 1 else w
            for name, w in zip(self._flat_weights_names, weights, strict=True)
        ]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["variant"] = self.variant

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict, strict: bool, missing_keys: list,
        unexpected_keys: list, error_msgs: list,
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        variant = self._variant_of(state_dict, prefix, local_metadata)
        if variant != self.variant:
            error_msgs.append(
                f"the checkpoint of {prefix[:-1] or 'this layer'!r} is of variant {variant!r}, the "
                f"layer of variant {self.variant!r}: the same weights mean another function"
            )

    def _variant_of(self, state_dict: Any, prefix: str, local_metadata: dict) -> str:
        """The variant of a checkpoint, this layer's where nothing speaks against it. Only the torch
        form has `bias_hh_*`. Metadata may be another module's once keys are renamed, and nn.GRU's
        own says nothing of a variant."""
        if any(key.startswith(f"{prefix}bias_hh_") for key in state_dict):
            return "torch"
        if not any(key.startswith(prefix) for key in state_dict):
            return self.variant
        if "variant" in local_metadata:
            return local_metadata["variant"]
        if self.variant == "textbook" and not self.bias and "version" in local_metadata:
            warnings.warn(
                f"the checkpoint of {prefix[:-1] or 'this layer'!r} does not say its variant; if "
                "it is nn.GRU's, its weights mean another function in the textbook variant",
                stacklevel=2,
            )
        return self.variant

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older files hold nn.RNNBase's list, which would keep weights that nobody reads.
        super().__setstate__({k: v for k, v in state.items() if k != "_flat_weights"})

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # Of `compile()`, it is bound to this layer: like any module's, a copy is not compiled.
        state.pop("_compiled_call_impl", None)
        return state

    @classmethod
    def from_torch(cls, gru: nn.GRU) -> "TriGRU":
        """A TriGRU that computes what `gru` computes and shares its parameters.

        Its hooks come along, pruning included. What else was set on the instance stays behind: a
        compiled form (`gru.compile()`), attributes of one's own, and, with a UserWarning, a
        `forward` of its own. Raises TypeError if `gru` is no nn.GRU, or of a subclass, as with a
        parametrisation: what that changes is not known."""
        if type(gru) is not nn.GRU:
            raise TypeError(f"expected an nn.GRU itself, got {type(gru).__name__}")
        layer = _same_state(gru, cls)
        layer.variant = "torch"
        return layer

    def to_torch(self) -> nn.GRU:
        """An nn.GRU that computes what this layer computes and shares its parameters and hooks.

        What stays behind is as in `from_torch`. Raises ValueError for what nn.GRU does not have,
        the textbook variant, heads, clip and a learned reset state; TypeError for a subclass, as
        with a parametrisation."""
        if type(self) is not TriGRU:
            raise TypeError(f"expected a TriGRU itself, got {type(self).__name__}")
        if why := self.why_no_gru():
            raise ValueError(why)
        return _same_state(self, nn.GRU)

    def why_no_gru(self) -> str:
        """What of this layer nn.GRU does not have, or "" if that is nothing."""
        if self.variant != "torch":
            return f"nn.GRU cannot compute the {self.variant} variant"
        return self.why_not_in("nn.GRU")

    def why_not_in(self, target: str) -> str:
        """What of this layer, but its variant, only a TriGRU has, or "" if that is nothing."""
        if self.heads > 1:
            return f"{target} has no heads, the layer has {self.heads}: see trigru.convert.to_dense"
        if self.clip is not None:
            return f"{target} has no clip, the layer has {self.clip}"
        if self.learn_reset:
            return f"{target} has no reset_state, which the layer has learned"
        return ""


_NO_EXPANDED_WEIGHTS = (
    "call_for_per_sample_grads knows PyTorch's own operations only, not the textbook variant, "
    "heads, a learned reset state, resets, update_scale nor clip: take "
    "torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)"
)
_KINDS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def _gates_of_heads(tensor: Any, heads: int) -> Any:
    """(D, 3H, …), r, z, n of all units, as (D heads, 3H / heads, …), those of each head's units."""
    if tensor is None:
        return None
    return tensor.unflatten(1, (3, heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def dense_blocks(blocks: Tensor) -> Tensor:
    """w_hh (3H, H) that computes what U's blocks (heads, 3H / heads, H / heads) compute."""
    # (3, heads, H / heads, heads, H / heads), all but those of a head with itself 0. No block_diag:
    # torch.onnx.export(…, dynamo=False) does not know it.
    gates = blocks.unflatten(1, (3, -1)).transpose(0, 1).unsqueeze(3)
    own = torch.eye(len(blocks), dtype=torch.bool, device=blocks.device)[:, None, :, None]
    return torch.where(own, gates, 0.0).flatten(3).flatten(0, 2)


def _rows_of(packed: PackedSequence, name: str, rows: Any) -> Any:
    """The data of what is packed as `packed` is."""
    if not isinstance(rows, PackedSequence):
        return rows
    if not torch.equal(rows.batch_sizes, packed.batch_sizes):
        raise ValueError(
            f"{name} must be packed as the input is, with batch_sizes {packed.batch_sizes}, got "
            f"{rows.batch_sizes}"
        )
    ours: Any = packed.sorted_indices
    theirs: Any = rows.sorted_indices
    if ours is theirs:
        return rows.data
    if rows.data.device != packed.data.device:
        return rows.data  # which is refused in its turn
    if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs)):
        raise ValueError(f"{name} must be sorted as the input is, with {ours}, got {theirs}")
    return rows.data


def _same_state(source: nn.RNNBase, target: Any) -> Any:
    """A `target` with `source`'s parameters, buffers, hooks and settings: all that an nn.GRU has
    once it is made, and what pruning and the like leave under a parameter's own name. Whatever
    else is set on an instance may be bound to it, and would go on running it."""
    if "forward" in vars(source):
        warnings.warn(
            f"the forward that was set on this {type(source).__name__} itself stays behind: "
            f"the new {target.__name__} runs that of its class",
            stacklevel=3,
        )
    own = {*vars(nn.GRU(1, 1, device="meta")), *source._flat_weights_names} - {"_flat_weights"}
    layer = target.__new__(target)
    layer.__dict__ = {
        name: value.copy() if isinstance(value, dict | list | set) else value
        for name, value in vars(source).items()
        if name in own
    }
    layer._flat_weights = source._flat_weights  # which TriGRU makes anew
    for key, hook in layer._load_state_dict_pre_hooks.items():
        if hook.with_module:  # these alone know whose they are
            hook = copy.copy(hook)
            hook.module = weakref.ref(layer)
            layer._load_state_dict_pre_hooks[key] = hook
    return layer
