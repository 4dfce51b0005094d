"""The persistent backward kernel and its launcher."""

import triton
import triton.language as tl
from torch import Tensor

from .exchange import deadline_from_now, publish, unwritten
from .launch import launch
from .plan import LaunchPlan, pad_hidden
from .tiles import add_product, load_u, operand, operand_mask, operand_offsets, total, zeros


@triton.jit
def _load_step(dy, gates, y_before, h0, own_y, own_gates, own_h, mask_h, rows, B, i, T,
               H: tl.constexpr, TEXTBOOK: tl.constexpr):  # fmt: skip
    """What the i-th step of the walk reads, all [BLOCK_H, BLOCK_B] and 0 beyond the last step:
    dy, r, z, n, gh_n (torch), and the state before the step, which is h0 in the last one."""
    mask = mask_h[:, None] & (rows < tl.where(i < T, B, 0))[None, :]
    mask_inner = mask_h[:, None] & (rows < tl.where(i + 1 < T, B, 0))[None, :]
    mask_last = mask_h[:, None] & (rows < tl.where(i + 1 == T, B, 0))[None, :]
    dy_t = tl.load(dy + own_y, mask=mask, other=0.0)
    r = tl.load(gates + own_gates, mask=mask, other=0.0)
    z = tl.load(gates + own_gates + H, mask=mask, other=0.0)
    n = tl.load(gates + own_gates + 2 * H, mask=mask, other=0.0)
    gh_n = n
    if not TEXTBOOK:
        gh_n = tl.load(gates + own_gates + 3 * H, mask=mask, other=0.0)
    h = tl.load(y_before + own_y, mask=mask_inner, other=0.0)
    h += tl.load(h0 + own_h, mask=mask_last, other=0.0)
    return dy_t, r, z, n, gh_n, h


@triton.jit(do_not_specialize=["T", "B", "wait_limit", "first_direction"])
def _gru_backward_kernel(
    dy_ptr,  # [T, B, D, H]
    dh_n_ptr,  # [D, B, H]
    w_hh_ptr,  # [D, 3, H_PAD, H_PAD]
    h0_ptr,  # [D, B, H]
    y_ptr,  # [T, B, D, H]
    gates_ptr,  # [T, B, D, G, H]
    dgh_ptr,  # [T, B, D, 3, H_ROW]  exchanged: gradients of the recurrent products
    dgx_ptr,  # [T, B, D, 3, H]      gradients of gx; the textbook form's are those of dgh
    dh0_ptr,  # [D, B, H]
    error_ptr,
    T,
    B,
    wait_limit,
    first_direction,
    D: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    H_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPIN: tl.constexpr,
    SOLO: tl.constexpr,
    TEXTBOOK: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = 3 if TEXTBOOK else 4
    CHUNKS: tl.constexpr = H_PAD // BLOCK_K
    PADDED: tl.constexpr = H != H_PAD
    dtype = dgh_ptr.dtype.element_ty
    deadline = deadline_from_now(wait_limit, SPIN)

    d = (first_direction + tl.program_id(2)).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    offs_b = tl.arange(0, BLOCK_B)  # [BLOCK_B]
    mask_h = offs_h < H
    # The columns of U that belong to this program's units: rows of Uᵀ.
    u_ptr = w_hh_ptr + d * (3 * H_PAD * H_PAD)
    u_r = load_u(u_ptr, offs_h, 1, H_PAD, H_PAD, BLOCK_K, SPLIT_K, PRECISION)
    u_z = load_u(u_ptr + H_PAD * H_PAD, offs_h, 1, H_PAD, H_PAD, BLOCK_K, SPLIT_K, PRECISION)
    u_n = load_u(u_ptr + 2 * H_PAD * H_PAD, offs_h, 1, H_PAD, H_PAD, BLOCK_K, SPLIT_K, PRECISION)

    # Against the direction of the forward pass.
    forwards = d < 0 if REVERSE else d == 0
    step = tl.where(forwards, -1, 1).to(tl.int64) * B * D  # in rows [D] of one batch element
    first = tl.where(forwards, T - 1, 0).to(tl.int64) * B * D

    own_y = offs_b[None, :] * (D * H) + offs_h[:, None]  # [BLOCK_H, BLOCK_B]
    own_gates = offs_b[None, :] * (D * G * H) + offs_h[:, None]
    own_dgh = offs_b[None, :] * (D * 3 * H_ROW) + offs_h[:, None]
    own_dgx = offs_b[None, :] * (D * 3 * H) + offs_h[:, None]
    own_h = offs_b[None, :] * H + offs_h[:, None]
    offs_operand = operand_offsets(offs_b, D * 3 * H_ROW, BLOCK_K, SPLIT_K)

    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    while row0 < B:  # the batch tiles of this program, one after another
        rows = row0 + offs_b
        mask_b = rows < B
        mask = mask_h[:, None] & mask_b[None, :]  # [BLOCK_H, BLOCK_B]
        mask_row = (offs_h < H_ROW)[:, None] & mask_b[None, :]  # with the padding that is exchanged
        mask_operand = operand_mask(mask_b, SPLIT_K)

        dy = dy_ptr + (first + row0 * D + d) * H
        y_before = y_ptr + (first + step + row0 * D + d) * H
        gates = gates_ptr + (first + row0 * D + d) * (G * H)
        dgh = dgh_ptr + (first + row0 * D + d) * (3 * H_ROW)
        dgx = dgx_ptr + (first + row0 * D + d) * (3 * H)
        h0 = h0_ptr + (d * B + row0) * H

        dh = tl.load(dh_n_ptr + (d * B + row0) * H + own_h, mask=mask, other=0.0).to(tl.float32)
        saved = _load_step(
            dy, gates, y_before, h0, own_y, own_gates, own_h, mask_h, rows, B, 0, T, H, TEXTBOOK
        )
        for i in range(T):
            dh += saved[0].to(tl.float32)
            r = saved[1].to(tl.float32)
            z = saved[2].to(tl.float32)
            n = saved[3].to(tl.float32)
            gh_n = saved[4].to(tl.float32)
            h = saved[5].to(tl.float32)
            # The next step's loads do not depend on the exchange: have them under way meanwhile.
            dy += step * H
            y_before += step * H
            gates += step * (G * H)
            saved = _load_step(
                dy, gates, y_before, h0, own_y, own_gates, own_h, mask_h, rows, B, i + 1, T, H,
                TEXTBOOK,
            )  # fmt: skip

            acc = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            if TEXTBOOK:
                da_n = dh * z * (1 - n * n)
                da_z = dh * (n - h) * z * (1 - z)
                publish(dgh + own_dgh + 2 * H_ROW, da_n, mask_row)
                publish(dgh + own_dgh + H_ROW, da_z, mask_row)
                acc_n = add_product(
                    acc, u_n, da_n.to(dtype), dgh + 2 * H_ROW + offs_operand, mask_operand,
                    deadline, error_ptr, BLOCK_K, CHUNKS, SPIN, SOLO, PRECISION,
                )  # fmt: skip
                d_reset = total(acc_n, mask_h, SPLIT_K, PADDED)  # d(r ⊙ h)
                da_r = d_reset * h * r * (1 - r)
                publish(dgh + own_dgh, da_r, mask_row)
                dh = dh * (1 - z) + d_reset * r
                # z arrived with n long ago
                acc = add_product(
                    acc, u_z, da_z.to(dtype), dgh + H_ROW + offs_operand, mask_operand, deadline,
                    error_ptr, BLOCK_K, CHUNKS, SPIN, SOLO, PRECISION,
                )  # fmt: skip
                acc = add_product(
                    acc, u_r, da_r.to(dtype), dgh + offs_operand, mask_operand, deadline,
                    error_ptr, BLOCK_K, CHUNKS, SPIN, SOLO, PRECISION,
                )  # fmt: skip
            else:
                da_n = dh * (1 - z) * (1 - n * n)
                da_z = dh * (h - n) * z * (1 - z)
                da_r = da_n * gh_n * r * (1 - r)
                dgh_n = da_n * r
                publish(dgh + own_dgh, da_r, mask_row)
                publish(dgh + own_dgh + H_ROW, da_z, mask_row)
                publish(dgh + own_dgh + 2 * H_ROW, dgh_n, mask_row)
                tl.store(dgx + own_dgx, da_r.to(dtype), mask=mask)
                tl.store(dgx + own_dgx + H, da_z.to(dtype), mask=mask)
                tl.store(dgx + own_dgx + 2 * H, da_n.to(dtype), mask=mask)
                dh = dh * z
                if SOLO:
                    da_r = operand(da_r.to(dtype), PRECISION)
                    da_z = operand(da_z.to(dtype), PRECISION)
                    dgh_n = operand(dgh_n.to(dtype), PRECISION)
                    acc = tl.dot(u_r[0], da_r, acc, input_precision=PRECISION)
                    acc = tl.dot(u_z[0], da_z, acc, input_precision=PRECISION)
                    acc = tl.dot(u_n[0], dgh_n, acc, input_precision=PRECISION)
                else:  # the gates lie next to each other: one product with K = 3 H_PAD
                    acc = add_product(
                        acc, u_r + u_z + u_n, acc, dgh + offs_operand, mask_operand, deadline,
                        error_ptr, BLOCK_K, 3 * CHUNKS, SPIN, SOLO, PRECISION,
                    )  # fmt: skip
            dh += total(acc, mask_h, SPLIT_K, PADDED)
            dgh += step * (3 * H_ROW)
            dgx += step * (3 * H)
        tl.store(dh0_ptr + (d * B + row0) * H + own_h, dh.to(dtype), mask=mask)
        row0 += tl.num_programs(1) * BLOCK_B


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
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the recurrence back from dy (T, B, D, H) and dh_n (D, B, H), all tensors contiguous and
    as `gru_forward` took and returned them.

    Returns dgx (T, B, D, 3H), dgh (T, B, D, 3H), the gradients of the recurrent products of the
    gates r, z, n, and dh0 (D, B, H). In the textbook form dgx and dgh are one tensor."""
    T, B, D, H = y.shape
    assert (H, D) == (plan.H, plan.D)
    shape = T, B, D, 3, plan.row
    dgh = y.new_empty(shape) if plan.solo else unwritten(*shape, like=y)
    dgx = y.new_empty(0 if textbook else (T, B, D, 3, H))
    dh0 = y.new_empty(D, B, H)
    arguments = dy, dh_n, pad_hidden(w_hh, plan.H_pad), h0, y, gates, dgh, dgx, dh0
    launch(_gru_backward_kernel, arguments, T, B, plan, TEXTBOOK=textbook, REVERSE=reverse)
    dgh = dgh[..., :H].reshape(T, B, D, 3 * H)
    return dgh if textbook else dgx.view(T, B, D, 3 * H), dgh, dh0
