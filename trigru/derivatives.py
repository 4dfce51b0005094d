"""How the operators of `ops` are differentiated, to any order, and batched by vmap.

A first derivative is the walk back, a kernel of its own. What lies beyond it goes through
`reference`, which is made of differentiable torch operations, and so does forward-mode AD.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
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


def _order(walk: dict[str, Any]) -> dict[str, Any]:
    return {name: walk[name] for name in ("reverse", "bidirectional", "heads")}


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
        modifiers, unsaved = modifiers[:4], modifiers[4:]
        before = None
        if unsaved:  # in a graph that was made without gradients, or by torch.jit.trace
            gx, b_hh = unsaved
            before = _states_before(y, h0, modifiers, ctx.switches)
            gates = _gates_again(gx, before, w_hh, b_hh, ctx.switches)
        gradients = _gradients(
            dy, dh_n, h0, w_hh, y, gates, modifiers, ctx.switches, before, dgates=dgates,
            of_weights=any(ctx.needs_input_grad[2:4]), has_bias=ctx.has_bias,
        )  # fmt: skip
        return *gradients, *[None] * 6

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _vmap(Recurrence.apply, "rswworwr", "rsr", info, in_dims, *inputs)


class LeanRecurrence(torch.autograd.Function):
    """`trigru::forward` and the input projection before it, which keeps the input and y alone: its
    backward makes gx and the gates anew, of all steps at once.

    To its forward gx comes from outside, without a gradient. Of second derivatives it knows nothing
    by itself: gates that were made anew are functions of the input, the weights and y. There are no
    rules for torch.func and graphs here, which take the ordinary way."""

    @staticmethod
    def forward(ctx, x, w_ih, b_ih, gx, h0, w_hh, b_hh, *modifiers_and_switches):
        modifiers, ctx.switches = modifiers_and_switches[:4], modifiers_and_switches[4:]
        y, h_n, _ = torch.ops.trigru.forward(gx, h0, w_hh, b_hh, *modifiers, *ctx.switches, False)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w_ih, b_ih, h0, w_hh, b_hh, y, *modifiers)
        return y, h_n

    @staticmethod
    @_gradients_may_be_batched
    def backward(ctx, dy, dh_n):
        x, w_ih, b_ih, h0, w_hh, b_hh, y, *modifiers = ctx.saved_tensors
        with _autocast_off(x.device):  # it was off or has cast all
            gx = F.linear(x, w_ih, b_ih).unflatten(-1, (len(w_hh), -1))
            before = _states_before(y, h0, modifiers, ctx.switches)
            gates = _gates_again(gx, before, w_hh, b_hh, ctx.switches)
            del gx
            needs = ctx.needs_input_grad
            dgx, *gradients = _gradients(
                dy, dh_n, h0, w_hh, y, gates, modifiers, ctx.switches, before,
                of_weights=needs[5] or needs[6], has_bias=b_hh is not None,
            )  # fmt: skip
            dgx = dgx.flatten(-2)  # (…, D · 3H)
            rows = dgx.flatten(0, -2)
            return (
                dgx @ w_ih if needs[0] else None,
                rows.T @ x.flatten(0, -2) if needs[1] else None,
                rows.sum(0) if needs[2] else None,
                None, *gradients, *[None] * 5,
            )  # fmt: skip


def _autocast_off(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _states_before(y: Tensor, h0: Tensor, modifiers: Sequence, switches: Sequence) -> Tensor:
    offsets, resets, reset_state, _ = modifiers
    return reference.states_before(
        y, h0, offsets, resets=resets, reset_state=reset_state, **_order(_walk(*switches))
    )


def _gates_again(
    gx: Tensor, before: Tensor, w_hh: Tensor, b_hh: Tensor | None, switches: Sequence
) -> Tensor:
    """The gates that `trigru::forward` would have saved, from what it was given and `before`."""
    textbook = _walk(*switches)["textbook"]
    return reference.gates_of(gx, before, w_hh, b_hh, textbook=textbook)


def _gradients(
    dy: Tensor | None, dh_n: Tensor | None, h0: Tensor, w_hh: Tensor, y: Tensor, gates: Tensor,
    modifiers: Sequence, switches: Sequence, before: Tensor | None, *, of_weights: bool,
    has_bias: bool, dgates: Tensor | None = None,
) -> tuple:  # fmt: skip
    """Of `trigru::forward`'s tensors, in their order: the walk back and, `of_weights`, the products
    behind it. before: the states before each step, where they are made already."""
    offsets, resets, reset_state, update_scale = modifiers
    walk = _walk(*switches)
    tensors = dy, dh_n, h0, w_hh, y, gates, *modifiers
    if dgates is not None or forward_mode():
        results = reference.gru_backward(
            dy, dh_n, h0, w_hh, y, gates, offsets, resets=resets, reset_state=reset_state,
            update_scale=update_scale, **walk, dgates=dgates,
        )  # fmt: skip
    elif torch.compiler.is_compiling():  # compiled autograd
        results = torch.ops.trigru.backward(*tensors, *switches)
    else:
        results = WalkBack.apply(*tensors, *switches)
    dgx, dgh, dh0, dreset_state, dscale = results
    dw_hh = db_hh = None
    if of_weights:
        dgh, reset_gate = (dgx, gates[..., 0, :]) if walk["textbook"] else (dgh, None)
        if offsets is None and resets is None:
            dw_hh, db_hh = _weight_gradients_of_padded(dgh, y, h0, reset_gate, **_order(walk))
        else:
            if before is None:
                before = _states_before(y, h0, modifiers, switches)
            reset = before if reset_gate is None else reset_gate * before
            dw_hh, db_hh = weight_gradients(dgh, before, reset)
    return (
        dgx, dh0, dw_hh, db_hh if has_bias else None, None, None,
        None if reset_state is None else dreset_state.sum(1),
        None if update_scale is None else dscale,
    )  # fmt: skip


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
    if operand_n is operand_rz:
        dw_hh = _products((dgh, operand_rz))
    else:
        H = operand_rz.shape[-1]
        dgh_rz, dgh_n = dgh.split((2 * H, H), -1)
        dw_hh = torch.cat((_products((dgh_rz, operand_rz)), _products((dgh_n, operand_n))), 1)
    return dw_hh, _bias_gradients(dgh)


def _weight_gradients_of_padded(
    dgh: Tensor, y: Tensor, h0: Tensor, reset_gate: Tensor | None, *, bidirectional: bool,
    reverse: bool, heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same of padded sequences without resets, from y (T, B, D, H), h0 (D, B, H) and, in the
    textbook form, r as y: the states before are y but for one step, and are not copied for it."""
    H, B = y.shape[-1], y.shape[1]
    h0 = h0.to(y.dtype).transpose(0, 1)  # (B, D, H)
    # Steps are cut off by rows: of T − 1 a compiler would ask whether it is 1.
    dgh, y = dgh.flatten(0, 1), y.flatten(0, 1)  # (N, D, …)
    reset_gate = None if reset_gate is None else reset_gate.flatten(0, 1)
    ways = []  # the recurrences by their direction
    for way in range(1 + bidirectional):

        def of_way(rows: Any, way: int = way) -> Any:  # (N, D, W) → (N, D / ways, W)
            if rows is None or not bidirectional:
                return rows
            return rows.unflatten(-2, (-1, 2, heads))[..., way, :, :].flatten(-3, -2)

        dgh_w, y_w, h0_w, r_w = map(of_way, (dgh, y, h0, reset_gate))
        if way == 1 or reverse:
            first, later, before = slice(y.shape[0] - B, None), slice(y.shape[0] - B), y_w[B:]
        else:
            first, later, before = slice(B), slice(B, None), y_w[: y.shape[0] - B]
        if r_w is None:
            ways.append(_products((dgh_w[first], h0_w), (dgh_w[later], before)))
            continue
        dgh_rz, dgh_n = dgh_w.split((2 * H, H), -1)
        dw_rz = _products((dgh_rz[first], h0_w), (dgh_rz[later], before))
        dw_n = _products((dgh_n[first], r_w[first] * h0_w), (dgh_n[later], r_w[later] * before))
        ways.append(torch.cat((dw_rz, dw_n), 1))
    if bidirectional:
        dw_hh = torch.stack([w.unflatten(0, (-1, heads)) for w in ways], 1).flatten(0, 2)
    else:
        (dw_hh,) = ways
    return dw_hh, _bias_gradients(dgh)


def _products(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """(D, G, H), from pairs of (…, D, G) and (…, D, H): their products, summed over all rows."""
    total = None
    for gradients, operand in pairs:
        gradients, operand = gradients.flatten(0, -3), operand.flatten(0, -3)  # (N, D, …)
        # One product over all steps. The CPU's adds up long sums less exactly than PyTorch's GRU,
        # which takes them step by step, so there the sum is one of short ones: not while a graph is
        # traced, which must not depend on their number, and not of 16 bits, to which each of the
        # short ones would be rounded.
        eager_cpu = type(gradients) is Tensor and gradients.device.type == "cpu"
        by_parts = eager_cpu and gradients.dtype.itemsize > 2
        rows = 64 if by_parts else gradients.shape[0]
        for g, o in zip(gradients.split(rows), operand.split(rows), strict=True):
            g, o = g.permute(1, 2, 0), o.transpose(0, 1)  # (D, G, n), (D, n, H)
            total = torch.bmm(g, o) if total is None else torch.baddbmm(total, g, o)
    assert total is not None
    return total


def _bias_gradients(dgh: Tensor) -> Tensor:
    """db_hh (D, 3H). A pass of its own: as a column of the products it would need a copy of the
    operands with a column of ones, and by pieces it would be rounded once for each."""
    return dgh.flatten(0, -3).sum(0)
