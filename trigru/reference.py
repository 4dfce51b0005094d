"""Both equations in plain torch: for any dtype and device, differentiable, slow, easy to check.

Every other path of the library is tested against this one, and it is the path where no kernel
fits. It has the kernels' own interface: directions side by side, the gates saved, and the walk
back written out, so that the same code around it serves both.
"""

import torch
from torch import Tensor


def _steps(T: int, backwards: bool) -> range:
    return range(T - 1, -1, -1) if backwards else range(T)


def states_before(y: Tensor, h0: Tensor, *, reverse: bool) -> Tensor:
    """The state before each step (T, B, D, H): y (T, B, D, H) one step on, and h0 (D, B, H)."""
    columns = []
    for d in range(h0.shape[0]):
        if reverse or d == 1:
            columns.append(torch.cat((y[1:, :, d], h0[d : d + 1])))
        else:
            columns.append(torch.cat((h0[d : d + 1], y[:-1, :, d])))
    return torch.stack(columns, 2) if len(columns) > 1 else columns[0].unsqueeze(2)


def gru_forward(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    *,
    textbook: bool,
    reverse: bool,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence over gx (T, B, D, 3H) from h0 (D, B, H), with w_hh (D, 3H, H) and b_hh
    (D, 3H). With D = 2 the second direction runs backwards in time; with D = 1, `reverse` says so.

    Returns y (T, B, D, H), h_n (D, B, H) and, if `save`, the gates (T, B, D, G, H), which are r, z,
    n and, in the torch form, gh_n = U_n h + b_hn; in the textbook form also r ⊙ h (T, B, D, H).
    What is not saved comes back empty."""
    T, D, H = len(gx), len(h0), h0.shape[-1]
    y, h_n, gates, rh = [], [], [], []
    for d in range(D):
        h = h0[d]
        u_rz, u_n = (u.T for u in w_hh[d].split((2 * H, H)))
        gx_rz, gx_n = gx[:, :, d].split((2 * H, H), dim=-1)  # (T, B, 2H), (T, B, H)
        b_n = gx.new_zeros(H)
        if b_hh is not None:
            b_rz, b_n = b_hh[d].split((2 * H, H))
            gx_rz = gx_rz + b_rz
        y_d, gates_d, rh_d = [h] * T, [h] * T, [h] * T  # to be overwritten
        for t in _steps(T, backwards=reverse or d == 1):
            rz = torch.sigmoid(torch.addmm(gx_rz[t], h, u_rz))
            r, z = rz.chunk(2, dim=-1)
            if textbook:
                rh_d[t] = r * h
                n = torch.tanh(torch.addmm(gx_n[t] + b_n, rh_d[t], u_n))
                h = (1 - z) * h + z * n
            else:
                gh_n = torch.addmm(b_n, h, u_n)
                n = torch.tanh(gx_n[t] + r * gh_n)
                h = (1 - z) * n + z * h
            y_d[t] = h
            if save:
                gates_d[t] = torch.cat((rz, n) if textbook else (rz, n, gh_n), -1)
        y.append(torch.stack(y_d))
        h_n.append(h)
        if save:
            gates.append(torch.stack(gates_d).unflatten(-1, (-1, H)))
            if textbook:
                rh.append(torch.stack(rh_d))
    return (
        torch.stack(y, 2),
        torch.stack(h_n),
        torch.stack(gates, 2) if gates else gx.new_empty(0),
        torch.stack(rh, 2) if rh else gx.new_empty(0),
    )


def gru_backward(
    dy: Tensor,
    dh_n: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    *,
    textbook: bool,
    reverse: bool,
    dgates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The walk back from dy (T, B, D, H) and dh_n (D, B, H), and from `dgates`, the gradient of the
    saved gates themselves, which only a second derivative has.

    Returns dgx (T, B, D, 3H), dgh (T, B, D, 3H), the gradients of the recurrent products, and dh0
    (D, B, H). Differentiable in every tensor: the gates are functions of gx and the state, and
    whoever differentiates twice passes the gradient that arrives at them back in as `dgates`."""
    T, _, D, H = y.shape
    before = states_before(y, h0, reverse=reverse)
    dgx: list[Tensor] = []
    dgh: list[Tensor] = []
    dh0: list[Tensor] = []
    for d in range(D):
        w_rz, w_n = w_hh[d].split((2 * H, H))
        dh, steps = dh_n[d], list[tuple[Tensor, Tensor]]([None] * T)  # type: ignore[list-item]
        for t in reversed(_steps(T, backwards=reverse or d == 1)):
            h = before[t, :, d]
            r, z, n, *gh_n = gates[t, :, d].unbind(-2)
            dh = dh + dy[t, :, d]
            dr, dz, dn, *dgh_n = (0, 0, 0, 0) if dgates is None else dgates[t, :, d].unbind(-2)
            if textbook:
                da_n = (dn + dh * z) * (1 - n * n)
                da_z = (dz + dh * (n - h)) * z * (1 - z)
                d_reset = da_n @ w_n
                da_r = (dr + d_reset * h) * r * (1 - r)
                da_rz = torch.cat((da_r, da_z), -1)
                dh = dh * (1 - z) + d_reset * r + da_rz @ w_rz
                steps[t] = (torch.cat((da_rz, da_n), -1),) * 2
            else:
                da_n = (dn + dh * (1 - z)) * (1 - n * n)
                da_z = (dz + dh * (h - n)) * z * (1 - z)
                da_r = (dr + da_n * gh_n[0]) * r * (1 - r)
                dgh_t = torch.cat((da_r, da_z, da_n * r + dgh_n[0]), -1)
                dh = dh * z + dgh_t @ w_hh[d]
                steps[t] = torch.cat((da_r, da_z, da_n), -1), dgh_t
        dh0.append(dh)
        for kept, column in zip((dgx, dgh), zip(*steps, strict=True), strict=True):
            kept.append(torch.stack(column))
    return torch.stack(dgx, 2), torch.stack(dgh, 2), torch.stack(dh0)
