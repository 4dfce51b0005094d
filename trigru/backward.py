"""The persistent backward kernel and its launcher."""

import triton
import triton.language as tl
from torch import Tensor

from .exchange import deadline_from_now, publish, unwritten
from .launch import launch
from .plan import LaunchPlan, pad_hidden
from .tiles import (
    add_product,
    beside_operand,
    load_u,
    operand,
    operand_offsets,
    rows_of_step,
    steps_of_tile,
    total,
    walks_forwards,
    zeros,
)


@triton.jit
def _load_step(dy, gates, y_before, h0, own_y, own_gates, own_h, mask_h, offs_b, running,
               running_before, H: tl.constexpr, TEXTBOOK: tl.constexpr):  # fmt: skip
    """What a step of the walk reads, all [BLOCK_H, BLOCK_B] and 0 for sequences without it: dy, r,
    z, n, gh_n (torch), and the state before, which is h0 for sequences that begin with it."""
    mask = mask_h[:, None] & (offs_b < running)[None, :]
    mask_inner = mask_h[:, None] & (offs_b < tl.minimum(running, running_before))[None, :]
    mask_first = mask_h[:, None] & ((offs_b < running) & (offs_b >= running_before))[None, :]
    dy_t = tl.load(dy + own_y, mask=mask, other=0.0)
    r = tl.load(gates + own_gates, mask=mask, other=0.0)
    z = tl.load(gates + own_gates + H, mask=mask, other=0.0)
    n = tl.load(gates + own_gates + 2 * H, mask=mask, other=0.0)
    gh_n = n
    if not TEXTBOOK:
        gh_n = tl.load(gates + own_gates + 3 * H, mask=mask, other=0.0)
    h = tl.load(y_before + own_y, mask=mask_inner, other=0.0)
    h += tl.load(h0 + own_h, mask=mask_first, other=0.0)
    return dy_t, r, z, n, gh_n, h


@triton.jit(
    do_not_specialize=["T", "B", "wait_limit", "first_direction"],
    # Read once a launch, and often from a view: any offset is the same kernel.
    do_not_specialize_on_alignment=["dh_n_ptr", "h0_ptr", "offsets_ptr"],
)
def _gru_backward_kernel(
    dy_ptr,  # [N, D, H]
    dh_n_ptr,  # [D, B, H]
    w_hh_ptr,  # [D, 3, H_PAD, H_PAD]
    h0_ptr,  # [D, B, H]
    y_ptr,  # [N, D, H]
    gates_ptr,  # [N, D, G, H]
    dgh_ptr,  # [N, D, 3, H_ROW]  exchanged: gradients of the recurrent products
    dgx_ptr,  # [N, D, 3, H]      gradients of gx; the textbook form's are those of dgh
    dh0_ptr,  # [D, B, H]
    offsets_ptr,  # [T + 1]           read if PACKED: where each step's rows begin, and N
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
    BIDIRECTIONAL: tl.constexpr,
    PACKED: tl.constexpr,
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
    forwards = walks_forwards(d, REVERSE, BIDIRECTIONAL)
    step = tl.where(forwards, -1, 1).to(tl.int64)

    own_y = offs_b[None, :] * (D * H) + offs_h[:, None]  # [BLOCK_H, BLOCK_B]
    own_gates = offs_b[None, :] * (D * G * H) + offs_h[:, None]
    own_dgh = offs_b[None, :] * (D * 3 * H_ROW) + offs_h[:, None]
    own_dgx = offs_b[None, :] * (D * 3 * H) + offs_h[:, None]
    own_h = offs_b[None, :] * H + offs_h[:, None]
    offs_operand = operand_offsets(offs_b, D * 3 * H_ROW, BLOCK_K, SPLIT_K)

    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    while row0 < B:  # the batch tiles of this program, one after another
        in_batch = offs_b < (B - row0).to(tl.int32)
        mask = mask_h[:, None] & in_batch[None, :]  # [BLOCK_H, BLOCK_B]
        dh = tl.load(dh_n_ptr + (d * B + row0) * H + own_h, mask=mask, other=0.0).to(tl.float32)

        steps = steps_of_tile(offsets_ptr, row0, T, PACKED)
        t = tl.where(forwards, steps - 1, 0).to(tl.int64)
        row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
        before, running_before = rows_of_step(offsets_ptr, t + step, row0, T, B, PACKED)
        dy = dy_ptr + (row * D + d) * H
        gates = gates_ptr + (row * D + d) * (G * H)
        y_before = y_ptr + (before * D + d) * H
        h0 = h0_ptr + (d * B + row0) * H
        dgh = dgh_ptr + (row * D + d) * (3 * H_ROW)
        dgx = dgx_ptr + (row * D + d) * (3 * H)
        saved = _load_step(
            dy, gates, y_before, h0, own_y, own_gates, own_h, mask_h, offs_b, running,
            running_before, H, TEXTBOOK,
        )  # fmt: skip
        for _ in range(steps):
            dy_t = saved[0].to(tl.float32)
            r = saved[1].to(tl.float32)
            z = saved[2].to(tl.float32)
            n = saved[3].to(tl.float32)
            gh_n = saved[4].to(tl.float32)
            h = saved[5].to(tl.float32)
            # The next step's loads do not depend on the exchange: have them under way meanwhile.
            # The pointers are moved on, not made anew: what a compiler can hoist, it keeps.
            row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
            following, running_next = rows_of_step(offsets_ptr, t + step, row0, T, B, PACKED)
            after, running_after = rows_of_step(offsets_ptr, t + 2 * step, row0, T, B, PACKED)
            rows = (following - row) * D
            dy += rows * H
            gates += rows * (G * H)
            y_before += (after - following) * (D * H)
            saved = _load_step(
                dy, gates, y_before, h0, own_y, own_gates, own_h, mask_h, offs_b, running_next,
                running_after, H, TEXTBOOK,
            )  # fmt: skip

            mask = mask_h[:, None] & (offs_b < running)[None, :]
            mask_row = (offs_h < H_ROW)[:, None] & (offs_b < running)[None, :]  # with the padding
            mask_operand = beside_operand(offs_b < running, SPLIT_K)
            dh_later = dh
            dh += dy_t
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
            if PACKED:
                dh = tl.where(mask, dh, dh_later)
            dgh += rows * (3 * H_ROW)
            dgx += rows * (3 * H)
            t += step
        mask = mask_h[:, None] & in_batch[None, :]
        tl.store(dh0_ptr + (d * B + row0) * H + own_h, dh.to(dtype), mask=mask)
        row0 += tl.num_programs(1) * BLOCK_B


def gru_backward(
    dy: Tensor,
    dh_n: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    *,
    textbook: bool,
    reverse: bool,
    bidirectional: bool,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the recurrence back from dy, laid out as y, and dh_n (D, B, H), all tensors contiguous
    and as `gru_forward` took and returned them, as `reference.gru_backward` does.

    Returns dgx, laid out as gx; dgh, the gradients of the recurrent products, empty in the textbook
    form, whose are those of gx; and dh0 (D, B, H)."""
    *shape, D, H = y.shape
    B = h0.shape[1]
    assert (H, D) == (plan.H, plan.D)
    rows = *shape, D, 3, plan.row
    dgh = y.new_empty(rows) if plan.solo else unwritten(*rows, like=y)
    dgx = y.new_empty(0 if textbook else (*shape, D, 3 * H))
    dh0 = y.new_empty(D, B, H)
    arguments = dy, dh_n, pad_hidden(w_hh, plan.H_pad), h0, y, gates, dgh, dgx, dh0
    switches = {"TEXTBOOK": textbook, "REVERSE": reverse, "BIDIRECTIONAL": bidirectional}
    launch(_gru_backward_kernel, arguments, offsets, shape, B, plan, **switches)
    dgh = dgh[..., :H].reshape(*shape, D, 3 * H)  # a copy where there is padding
    return (dgh, dgx, dh0) if textbook else (dgx, dgh, dh0)
