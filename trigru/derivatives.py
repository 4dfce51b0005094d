"""How the operators of `ops` are differentiated, to any order, and batched by vmap.

A first derivative is the walk back, a kernel of its own. What lies beyond it goes through
`reference`, which is made of differentiable torch operations, and so does forward-mode AD.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference


def forward_mode() -> bool:
    """Whether forward-mode AD is at work, here or in torch.func. Nested, it would leave out the
    inner tangents of an autograd.Function without a word."""
    return forward_ad._current_level >= 0


def _walk(
    textbook: bool, reverse: bool, bidirectional: bool, heads: int, clip: float | None
) -> dict[str, Any]:
    return {
        "textbook": textbook, "reverse": reverse, "bidirectional": bidirectional, "heads": heads,
        "clip": clip,
    }  # fmt: skip


def _gradients_may_be_batched(backward: Callable) -> Callable:
    """A `backward` for torch.autograd.grad(is_grads_batched=True) too, and so for
    torch.autograd.functional with vectorize=True.

    They batch by a vmap older than torch.func's, of which an autograd.Function knows nothing: what
    it returns would not be in the graph, and second derivatives wrong without a word. So take the
    batch off the gradients, and let torch.func's vmap do it, by the rules that are here."""

    @functools.wraps(backward)
    def function(ctx, *gradients):
        if torch.compiler.is_compiling():  # which knows no such question
            return backward(ctx, *gradients)
        is_batched = torch._C._functorch.is_legacy_batchedtensor
        batched = [g is not None and is_batched(g) for g in gradients]
        if not any(batched):
            return backward(ctx, *gradients)
        level = _legacy_level(gradients[batched.index(True)])
        plain = [
            torch._remove_batch_dim(g, level, 1, 0) if b else g
            for g, b in zip(gradients, batched, strict=True)
        ]
        wanted: list[bool] = []  # vmap knows no None

        def wanted_alone(*gradients):
            results = backward(ctx, *gradients)
            wanted[:] = (r is not None for r in results)
            return tuple(r for r in results if r is not None)

        results = iter(torch.vmap(wanted_alone, tuple(0 if b else None for b in batched))(*plain))
        return tuple(torch._add_batch_dim(next(results), 0, level) if w else None for w in wanted)

    return function


def _legacy_level(tensor: Tensor) -> int:
    """The nesting of the vmap that batched the tensor. Only the thread that called it knows the
    current one, and CUDA's gradients are computed in another."""
    for level in range(1, 65):  # as many as there can be
        if not torch._C._functorch.is_legacy_batchedtensor(
            torch._remove_batch_dim(tensor, level, 1, 0)
        ):
            return level
    raise NotImplementedError(
        "TriGRU has no gradients under nested is_grads_batched=True: use torch.func.vmap"
    )


class Recurrence(torch.autograd.Function):
    """`trigru::forward` with its gradients and its batching rule.

    The saved gates are an output so that a second derivative can flow through them: they are
    functions of gx and the state, and what differentiating `WalkBack` sends to them returns here
    as `dgates`."""

    @staticmethod
    def forward(*inputs):
        return torch.ops.trigru.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gx, h0, w_hh, b_hh, offsets, resets, reset_state, update_scale, *ctx.switches, save = inputs
        y, _, gates = output
        ctx.has_bias = b_hh is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            h0, w_hh, y, gates, offsets, resets, reset_state, update_scale,
            *(() if save else (gx, b_hh)),
        )  # fmt: skip

    @staticmethod
    @_gradients_may_be_batched
    def backward(ctx, dy, dh_n, dgates):
        h0, w_hh, y, gates, *modifiers = ctx.saved_tensors
        offsets, resets, reset_state, update_scale, *unsaved = modifiers
        modifiers = modifiers[:4]
        if unsaved:  # in a graph that was made without gradients, or by torch.jit.trace
            gx, b_hh = unsaved
            _, _, gates = torch.ops.trigru.forward(
                gx, h0, w_hh, b_hh, *modifiers, *ctx.switches, True
            )
        tensors = dy, dh_n, h0, w_hh, y, gates, *modifiers
        walk = _walk(*ctx.switches)
        if dgates is not None or forward_mode():
            results = reference.gru_backward(
                *tensors[:7], resets=resets, reset_state=reset_state, update_scale=update_scale,
                **walk, dgates=dgates,
            )  # fmt: skip
        elif torch.compiler.is_compiling():  # compiled autograd
            results = torch.ops.trigru.backward(*tensors, *ctx.switches)
        else:
            results = WalkBack.apply(*tensors, *ctx.switches)
        dgx, dgh, dh0, dreset_state, dscale = results
        dw_hh = db_hh = None
        if any(ctx.needs_input_grad[2:4]):
            before = reference.states_before(
                y, h0, offsets, resets=resets, reset_state=reset_state,
                **{name: walk[name] for name in ("reverse", "bidirectional", "heads")},
            )  # fmt: skip
            reset = gates[..., 0, :] * before if walk["textbook"] else before
            dw_hh, db_hh = weight_gradients(dgx if walk["textbook"] else dgh, before, reset)
        return (
            dgx, dh0, dw_hh, db_hh if ctx.has_bias else None, None, None,
            None if reset_state is None else dreset_state.sum(1),
            None if update_scale is None else dscale, *[None] * 6,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(Recurrence.apply, "rswworwr", "rsr", info, in_dims, *inputs)


class WalkBack(torch.autograd.Function):
    """`trigru::backward` with gradients, those of `reference`'s walk back, and a batching rule."""

    @staticmethod
    def forward(*inputs):
        return torch.ops.trigru.backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:10])
        ctx.walk = _walk(*inputs[10:])

    @staticmethod
    @_gradients_may_be_batched
    def backward(ctx, *cotangents):
        *tensors, offsets, resets, reset_state, update_scale = ctx.saved_tensors
        tensors += reset_state, update_scale
        given = [i for i, t in enumerate(tensors) if t is not None]

        def function(*some):
            every: list[Any] = [None] * len(tensors)
            for i, t in zip(given, some, strict=True):
                every[i] = t
            dy, dh_n, h0, w_hh, y, gates, reset_state, update_scale = every
            return reference.gru_backward(
                dy, dh_n, h0, w_hh, y, gates, offsets, resets=resets, reset_state=reset_state,
                update_scale=update_scale, **ctx.walk,
            )  # fmt: skip

        _, pull, *_ = torch.func.vjp(function, *(tensors[i] for i in given))
        pulled = dict(zip(given, pull(cotangents), strict=True))
        gradients = [pulled.get(i) for i in range(len(tensors))]
        return *gradients[:6], None, None, *gradients[6:], *[None] * 5

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(WalkBack.apply, "rsswrrorwr", "rrssr", info, in_dims, *inputs)


@torch.compiler.disable
def _vmap(
    operator: Callable, kinds: str, out_kinds: str, info: Any, in_dims: tuple, *inputs: Any
) -> tuple[tuple, tuple]:
    """V calls of an operator as one: the others' sequences are further sequences of the batch or,
    where each call has weights of its own, further recurrences.

    kinds: a letter for each tensor, r for rows, (T, B, D, …) or (N, D, …), s for states (D, B, H),
    w for weights (D, …), o for offsets."""
    V = info.batch_size
    offsets = inputs[kinds.index("o")]
    if in_dims[kinds.index("o")] is not None:
        raise NotImplementedError("TriGRU has no vmap over the lengths of packed sequences")
    own_weights = any(k == "w" and dim is not None for k, dim in zip(kinds, in_dims, strict=False))
    D_in_rows = 2 if offsets is None else 1
    # The calls are brought before D or behind B, and made one with it.
    into = {"r": D_in_rows, "s": 0, "w": 0} if own_weights else {"r": D_in_rows - 1, "s": 1}
    behind = 0 if own_weights else 1
    folded, others = list(inputs), {}  # others: the size of what the calls are made one with
    for i, (kind, tensor, dim) in enumerate(zip(kinds, inputs, in_dims, strict=False)):
        if kind in into and tensor is not None:
            at = into[kind] + behind
            if dim is None:
                tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], V, *tensor.shape[at:])
            else:
                tensor = tensor.movedim(dim, at)
            others[kind] = tensor.shape[into[kind] + 1 - behind]
            folded[i] = tensor.flatten(into[kind], into[kind] + 1)
        elif kind == "o" and tensor is not None and not own_weights:
            folded[i] = tensor * V
    outputs, out_dims = [], []
    for kind, output in zip(out_kinds, operator(*folded), strict=True):
        if output.dim() == 1:  # what is not saved is empty
            outputs.append(output.expand(V, 0))
            out_dims.append(0)
        else:
            sizes = (V, others[kind]) if own_weights else (others[kind], V)
            outputs.append(output.unflatten(into[kind], sizes))
            out_dims.append(into[kind] + behind)
    return tuple(outputs), tuple(out_dims)


def weight_gradients(dgh: Tensor, operand_rz: Tensor, operand_n: Tensor) -> tuple[Tensor, Tensor]:
    """dw_hh (D, 3H, H) and db_hh (D, 3H) from dgh (…, D, 3H), the gradients of the recurrent
    products, and what U_r, U_z and U_n were multiplied by, each (…, D, H)."""
    H = operand_rz.shape[-1]
    dgh = dgh.flatten(0, -3)  # (N, D, 3H)
    # One product over all steps. The CPU's adds up long sums less exactly than PyTorch's GRU, which
    # takes them step by step, so there the sum is one of short ones: not while a graph is traced,
    # which must not depend on their number.
    rows = 64 if type(dgh) is Tensor and dgh.device.type == "cpu" else dgh.shape[0]

    def product(gradients: Tensor, operand: Tensor) -> Tensor:  # (D, …, H), summed over the rows
        parts = zip(gradients.split(rows), operand.flatten(0, -3).split(rows), strict=True)
        products = (torch.bmm(g.permute(1, 2, 0), o.transpose(0, 1)) for g, o in parts)
        return functools.reduce(torch.add, products)

    if operand_n is operand_rz:
        dw_hh = product(dgh, operand_rz)
    else:
        dw_hh = torch.cat(
            (product(dgh[..., : 2 * H], operand_rz), product(dgh[..., 2 * H :], operand_n)), dim=1
        )
    return dw_hh, dgh.sum(0)
