"""Both equations in plain torch: for any dtype and device, differentiable, slow, easy to check.

Every other path of the library is tested against this one, and it is the path where no kernel
fits. It has the kernels' own interface: recurrences side by side, the gates saved, and the walk
back written out, so that the same code around it serves both.

What has a row for every step of every sequence is (T, B, D, …), or packed, (N, D, …), as in a
PackedSequence: the longest sequence first, and the rows of step t are offsets[t] … offsets[t + 1].

Four things change a step, none of which need be there:

resets        bool, (T, B, D) or (N, D): where true, the state entering this step is the reset state
reset_state   (D, H), or None for zeros
update_scale  (T, B, D, H) or (N, D, H): the candidate's share of the new state, times this
clip          float: the new state is limited to ± this, rounded to the state's type; where it gets
              there no gradient passes
"""

from typing import Any

import torch
from torch import Tensor


def runs_backwards(d: int, *, reverse: bool, bidirectional: bool, heads: int = 1) -> bool:
    """Of D recurrences side by side, does the d-th walk from the last step to the first?
    All do with `reverse`, every second run of `heads` with `bidirectional`."""
    return d // heads % 2 == 1 if bidirectional else reverse


def steps_of(rows: Tensor, offsets: Tensor | None) -> list[int]:
    """How many sequences each step has."""
    return [rows.shape[1]] * rows.shape[0] if offsets is None else offsets.diff().tolist()


def states_before(
    y: Tensor,
    h0: Tensor,
    offsets: Tensor | None,
    *,
    reverse: bool,
    bidirectional: bool,
    heads: int = 1,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> Tensor:
    """The state entering each step, laid out as y (T, B, D, H) or (N, D, H), from it and h0
    (D, B, H)."""
    columns = []
    for d, (y_d, h0_d) in enumerate(zip(y.unbind(-2), h0.to(y.dtype), strict=True)):
        backwards = runs_backwards(d, reverse=reverse, bidirectional=bidirectional, heads=heads)
        if offsets is not None:
            columns.append(torch.cat((y_d, h0_d))[_rows_before(len(y), offsets, backwards)])
        elif backwards:
            columns.append(torch.cat((y_d[1:], h0_d.unsqueeze(0))))
        else:
            columns.append(torch.cat((h0_d.unsqueeze(0), y_d[:-1])))
    before = torch.stack(columns, -2) if len(columns) > 1 else columns[0].unsqueeze(-2)
    return entering(before, resets, reset_state)


def entering(before: Tensor, resets: Tensor | None, reset_state: Tensor | None) -> Tensor:
    """The states before (…, D, H), but the reset state (D, H) where resets (…, D) are true."""
    if resets is None:
        return before
    reset = torch.zeros_like(before[..., :1]) if reset_state is None else reset_state
    return torch.where(resets.unsqueeze(-1), reset, before)


def _rows_before(N: int, offsets: Tensor, backwards: bool) -> Tensor:
    """For each row of a packed tensor, the row of the same sequence that was computed before it, or
    N + b where it is the first of sequence b."""
    row = torch.arange(N, device=offsets.device)
    step = torch.searchsorted(offsets, row, right=True) - 1
    b = row - offsets[step]
    if backwards:
        ends = torch.cat((offsets, offsets[-1:]))  # the step after the last one has no rows
        first, end = ends[step + 1], ends[step + 2]
    else:
        first, end = offsets[(step - 1).clamp(min=0)], offsets[step]
    return torch.where(first + b < end, first + b, N + b)


def gru_forward(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    offsets: Tensor | None,
    *,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
    heads: int = 1,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    update_scale: Tensor | None = None,
    clip: float | None = None,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over gx (T, B, D, 3H) or (N, D, 3H), from h0 (D, B, H), with w_hh (D, 3H, H)
    and b_hh (D, 3H).

    Returns y (T, B, D, H) or (N, D, H), h_n (D, B, H) and, if `save`, the gates, as y but with
    (D, G, H), which are r, z, n and, in the torch form, gh_n = U_n h + b_hn; else an empty
    tensor."""
    H = h0.shape[-1]
    steps = steps_of(gx, offsets)
    rows, resets, update_scale = (_in_rows(t, offsets) for t in (gx, resets, update_scale))
    limit = None if clip is None else gx.new_full((), clip)
    y, h_n, gates = [], [], []
    for d, h in enumerate(h0.to(gx.dtype)):
        u_rz, u_n = (u.T for u in w_hh[d].split((2 * H, H)))
        gx_rz, gx_n = rows[:, d].split((2 * H, H), dim=-1)  # (N, 2H), (N, H)
        b_n = gx.new_zeros(H)
        if b_hh is not None:
            b_rz, b_n = b_hh[d].split((2 * H, H))
            gx_rz = gx_rz + b_rz
        gx_rz, gx_n = gx_rz.split(steps), gx_n.split(steps)
        resets_d = None if resets is None else resets[:, d].split(steps)
        scale_d = None if update_scale is None else update_scale[:, d].split(steps)
        y_d, gates_d = [h] * len(steps), [h] * len(steps)  # to be overwritten
        order = range(len(steps))
        if runs_backwards(d, reverse=reverse, bidirectional=bidirectional, heads=heads):
            order = order[::-1]
        for t in order:
            waiting = h[steps[t] :]  # the states of sequences that have no step t
            h = h[: steps[t]]
            if resets_d is not None:
                h = entering(h, resets_d[t], None if reset_state is None else reset_state[d])
            rz = torch.sigmoid(torch.addmm(gx_rz[t], h, u_rz))
            r, z = rz.chunk(2, dim=-1)
            if textbook:
                n = torch.tanh(torch.addmm(gx_n[t] + b_n, r * h, u_n))
            else:
                gh_n = torch.addmm(b_n, h, u_n)
                n = torch.tanh(gx_n[t] + r * gh_n)
            if scale_d is not None:
                share = scale_d[t] * (z if textbook else 1 - z)
                h = (1 - share) * h + share * n
            elif textbook:
                h = (1 - z) * h + z * n
            else:
                h = (1 - z) * n + z * h
            if limit is not None:
                # At the limit no gradient passes: that it is there is all that a walk back sees.
                h = torch.where(h >= limit, limit, torch.where(h <= -limit, -limit, h))
            y_d[t] = h
            if save:
                gates_d[t] = torch.cat((rz, n) if textbook else (rz, n, gh_n), -1)
            if offsets is not None:
                h = torch.cat((h, waiting))
        y.append(torch.cat(y_d))
        h_n.append(h)
        if save:
            gates.append(torch.cat(gates_d).unflatten(-1, (-1, H)))
    shape = gx.shape[:-2]
    return (
        torch.stack(y, 1).unflatten(0, shape),
        torch.stack(h_n).to(h0.dtype),
        torch.stack(gates, 1).unflatten(0, shape) if save else gx.new_empty(0),
    )


def gates_of(
    gx: Tensor, before: Tensor, w_hh: Tensor, b_hh: Tensor | None, *, textbook: bool
) -> Tensor:
    """The gates that `gru_forward` saves, of all steps at once: from gx (…, D, 3H) and the states
    before (…, D, H)."""
    H = before.shape[-1]
    u_rz, u_n = w_hh.split((2 * H, H), 1)
    gx_rz, gx_n = gx.split((2 * H, H), -1)
    b_n = gx.new_zeros(len(w_hh), H)
    if b_hh is not None:
        b_rz, b_n = b_hh.split((2 * H, H), -1)
        gx_rz = gx_rz + b_rz
    rz = torch.sigmoid(_add_products(gx_rz, before, u_rz))
    r = rz[..., :H]
    if textbook:
        n = torch.tanh(_add_products(gx_n + b_n, r * before, u_n))
        return torch.cat((rz, n), -1).unflatten(-1, (3, H))
    gh_n = _add_products(b_n.expand_as(gx_n), before, u_n)
    n = torch.tanh(gx_n + r * gh_n)
    return torch.cat((rz, n, gh_n), -1).unflatten(-1, (4, H))


def _add_products(to: Tensor, states: Tensor, u: Tensor) -> Tensor:
    """to (…, D, G) plus each of the states (…, D, H) times its u (D, G, H)."""
    to, rows = (t.flatten(0, -3).transpose(0, 1) for t in (to, states))  # (D, N, …)
    sums = torch.baddbmm(to, rows, u.transpose(1, 2))
    return sums.transpose(0, 1).unflatten(0, states.shape[:-2])


def _in_rows(tensor: Any, offsets: Tensor | None) -> Any:
    """(T, B, …) as the (N, …) that it is when packed."""
    return tensor if tensor is None or offsets is not None else tensor.flatten(0, 1)


def gru_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    *,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
    heads: int = 1,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    update_scale: Tensor | None = None,
    clip: float | None = None,
    dgates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The walk back from dy, laid out as y, and dh_n (D, B, H), each None for zeros, and from
    `dgates`, the gradient of the saved gates themselves, which only a second derivative has.

    Returns dgx, laid out as gx; dgh, the gradients of the recurrent products, which in the textbook
    form are those of gx, so that it comes back empty; dh0 (D, B, H); each sequence's share of the
    reset state's gradient (D, B, H) and the gradient of update_scale, empty without one. All is
    differentiable in every tensor: the gates are functions of gx and the state, and whoever
    differentiates twice passes the gradient that arrives at them back in as `dgates`."""
    H = y.shape[-1]
    steps = steps_of(y, offsets)
    before = states_before(
        y, h0, offsets, reverse=reverse, bidirectional=bidirectional, heads=heads, resets=resets,
        reset_state=reset_state,
    )  # fmt: skip
    shape = y.shape[:-2]
    dy, gates, before, dgates, y, resets, update_scale = (
        _in_rows(t, offsets) for t in (dy, gates, before, dgates, y, resets, update_scale)
    )
    dh_n = torch.zeros_like(h0) if dh_n is None else dh_n
    limit = None if clip is None else y.new_full((), clip)
    walked = []  # of each recurrence, as returned
    for d, dh in enumerate(dh_n.to(y.dtype)):
        w_rz, w_n = w_hh[d].split((2 * H, H))
        before_d, gates_d, y_d = (t[:, d].split(steps) for t in (before, gates, y))
        dy_d, dgates_d, resets_d, scale_d = (
            None if t is None else t[:, d].split(steps) for t in (dy, dgates, resets, update_scale)
        )
        dreset_d = torch.zeros_like(dh)
        dgx_d, dgh_d, dscale_d = ([dh] * len(steps) for _ in range(3))  # to be overwritten
        order = range(len(steps))
        if not runs_backwards(d, reverse=reverse, bidirectional=bidirectional, heads=heads):
            order = order[::-1]
        for t in order:
            waiting = dh[steps[t] :]
            h = before_d[t]
            r, z, n, *gh_n = gates_d[t].unbind(-2)
            dr, dz, dn, *dgh_n = (0, 0, 0, 0) if dgates_d is None else dgates_d[t].unbind(-2)
            dh = dh[: steps[t]] if dy_d is None else dh[: steps[t]] + dy_d[t]
            if limit is not None:
                dh = torch.where(y_d[t].abs() >= limit, 0, dh)
            dh_scaled, kept = dh, 1 - z if textbook else z
            if scale_d is not None:
                share = z if textbook else 1 - z
                dscale_d[t] = dh * ((n - h) * share)
                dh_scaled, kept = dh * scale_d[t], 1 - scale_d[t] * share
            if textbook:
                da_n = (dn + dh_scaled * z) * (1 - n * n)
                da_z = (dz + dh_scaled * (n - h)) * z * (1 - z)
                d_reset = da_n @ w_n
                da_r = (dr + d_reset * h) * r * (1 - r)
                da_rz = torch.cat((da_r, da_z), -1)
                dh = dh * kept + d_reset * r + da_rz @ w_rz
            else:
                da_n = (dn + dh_scaled * (1 - z)) * (1 - n * n)
                da_z = (dz + dh_scaled * (h - n)) * z * (1 - z)
                da_r = (dr + da_n * gh_n[0]) * r * (1 - r)
                dgh_d[t] = torch.cat((da_r, da_z, da_n * r + dgh_n[0]), -1)
                dh = dh * kept + dgh_d[t] @ w_hh[d]
            dgx_d[t] = torch.cat((da_r, da_z, da_n), -1)
            if resets_d is not None:
                reset = resets_d[t].unsqueeze(-1)
                if reset_state is not None:
                    mine = dreset_d[: steps[t]] + torch.where(reset, dh, 0)
                    dreset_d = torch.cat((mine, dreset_d[steps[t] :]))
                dh = torch.where(reset, 0, dh)
            if offsets is not None:
                dh = torch.cat((dh, waiting))
        walked.append((torch.cat(dgx_d), torch.cat(dgh_d), dh, dreset_d, torch.cat(dscale_d)))
    dgx, dgh, dh0, dreset, dscale = zip(*walked, strict=True)

    def rows(columns: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(columns, 1).unflatten(0, shape)

    return (
        rows(dgx),
        y.new_empty(0) if textbook else rows(dgh),
        torch.stack(dh0).to(h0.dtype),
        y.new_empty(0) if reset_state is None else torch.stack(dreset),
        y.new_empty(0) if update_scale is None else rows(dscale),
    )
