"""The persistent forward kernel and its launcher."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .exchange import deadline_from_now, peek, publish, settle, unwritten
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
    tanh,
    total,
    walks_forwards,
    zeros,
)


@triton.jit(
    do_not_specialize=["T", "B", "wait_limit", "first_direction"],
    # Read once a launch, and often from a view: any offset is the same kernel.
    do_not_specialize_on_alignment=["b_hh_ptr", "h0_ptr", "offsets_ptr"],
)
def _gru_forward_kernel(
    gx_ptr,  # [N, D, 3, H]     input projection of the gates r, z, n
    w_hh_ptr,  # [D, 3, H_PAD, H_PAD]
    b_hh_ptr,  # [D, 3, H]        read if HAS_BIAS
    h0_ptr,  # [D, B, H]
    y_ptr,  # [N + B, D, H_ROW] exchanged: the state after each step, then h0 as if one of them
    rh_ptr,  # [N, D, H_ROW]    exchanged: r ⊙ h, textbook only
    gates_ptr,  # [N, D, G, H]     written if SAVE: r, z, n and (torch) gh_n
    h_n_ptr,  # [D, B, H]
    offsets_ptr,  # [T + 1]          read if PACKED: where each step's rows begin, and N
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
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    G: tl.constexpr = 3 if TEXTBOOK else 4
    CHUNKS: tl.constexpr = H_PAD // BLOCK_K
    PADDED: tl.constexpr = H != H_PAD
    dtype = y_ptr.dtype.element_ty
    deadline = deadline_from_now(wait_limit, SPIN)

    d = (first_direction + tl.program_id(2)).to(tl.int64)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)  # [BLOCK_H]
    offs_b = tl.arange(0, BLOCK_B)  # [BLOCK_B]
    mask_h = offs_h < H
    u_ptr = w_hh_ptr + d * (3 * H_PAD * H_PAD)
    u_r = load_u(u_ptr, offs_h, H_PAD, 1, H_PAD, BLOCK_K, SPLIT_K, PRECISION)
    u_z = load_u(u_ptr + H_PAD * H_PAD, offs_h, H_PAD, 1, H_PAD, BLOCK_K, SPLIT_K, PRECISION)
    u_n = load_u(u_ptr + 2 * H_PAD * H_PAD, offs_h, H_PAD, 1, H_PAD, BLOCK_K, SPLIT_K, PRECISION)
    b_r = tl.zeros([BLOCK_H, 1], tl.float32)
    b_z = b_r
    b_n = b_r
    if HAS_BIAS:
        bias = b_hh_ptr + d * (3 * H) + offs_h
        b_r = tl.load(bias, mask=mask_h, other=0.0).to(tl.float32)[:, None]
        b_z = tl.load(bias + H, mask=mask_h, other=0.0).to(tl.float32)[:, None]
        b_n = tl.load(bias + 2 * H, mask=mask_h, other=0.0).to(tl.float32)[:, None]

    N = tl.load(offsets_ptr + T) if PACKED else T.to(tl.int64) * B
    forwards = walks_forwards(d, REVERSE, BIDIRECTIONAL)
    step = tl.where(forwards, 1, -1).to(tl.int64)

    own = offs_b[None, :] * (D * H_ROW) + offs_h[:, None]  # [BLOCK_H, BLOCK_B]
    own_gx = offs_b[None, :] * (D * 3 * H) + offs_h[:, None]
    own_gates = offs_b[None, :] * (D * G * H) + offs_h[:, None]
    own_h = offs_b[None, :] * H + offs_h[:, None]
    offs_operand = operand_offsets(offs_b, D * H_ROW, BLOCK_K, SPLIT_K)

    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    while row0 < B:  # the batch tiles of this program, one after another
        in_batch = offs_b < (B - row0).to(tl.int32)
        mask = mask_h[:, None] & in_batch[None, :]  # [BLOCK_H, BLOCK_B]
        h = tl.load(h0_ptr + (d * B + row0) * H + own_h, mask=mask, other=0.0).to(tl.float32)
        if not SOLO:
            mask_row = (offs_h < H_ROW)[:, None] & in_batch[None, :]
            publish(y_ptr + ((N + row0) * D + d) * H_ROW + own, h, mask_row)

        steps = steps_of_tile(offsets_ptr, row0, T, PACKED)
        t = tl.where(forwards, 0, steps - 1).to(tl.int64)
        row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
        gx = gx_ptr + (row * D + d) * (3 * H)
        mask = mask_h[:, None] & (offs_b < running)[None, :]
        gx_r = tl.load(gx + own_gx, mask=mask, other=0.0)
        gx_z = tl.load(gx + own_gx + H, mask=mask, other=0.0)
        gx_n = tl.load(gx + own_gx + 2 * H, mask=mask, other=0.0)

        for _ in range(steps):
            a_r = gx_r.to(tl.float32) + b_r
            a_z = gx_z.to(tl.float32) + b_z
            a_n = gx_n.to(tl.float32)
            # The next step's input does not depend on the exchange: have it under way meanwhile.
            row, running = rows_of_step(offsets_ptr, t + step, row0, T, B, PACKED)
            gx = gx_ptr + (row * D + d) * (3 * H)
            mask = mask_h[:, None] & (offs_b < running)[None, :]
            gx_r = tl.load(gx + own_gx, mask=mask, other=0.0)
            gx_z = tl.load(gx + own_gx + H, mask=mask, other=0.0)
            gx_n = tl.load(gx + own_gx + 2 * H, mask=mask, other=0.0)

            row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
            row = row * D + d
            mask = mask_h[:, None] & (offs_b < running)[None, :]
            mask_row = (offs_h < H_ROW)[:, None] & (offs_b < running)[None, :]  # with the padding
            mask_operand = beside_operand(offs_b < running, SPLIT_K)
            # The state before is h0 in a sequence's first step: for all of them at once or, when
            # packed sequences are walked from their ends, each in its own step.
            before, running = rows_of_step(offsets_ptr, t - step, row0, T, B, PACKED)
            if PACKED:
                before = tl.where(offs_b < running, before, N + row0)  # [BLOCK_B]
                before = beside_operand(before, SPLIT_K)
            else:
                before = tl.where(running > 0, before, N + row0)
            source = y_ptr + (before * D + d) * H_ROW + offs_operand

            acc_r = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            acc_z = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            acc_n = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            if SOLO:
                state = operand(h.to(dtype), PRECISION)
            else:
                ahead = peek(source, mask_operand)
            for c in tl.static_range(CHUNKS):
                if not SOLO:
                    chunk = source + c * BLOCK_K
                    state = settle(ahead, chunk, mask_operand, deadline, error_ptr, SPIN)
                    state = operand(state, PRECISION)
                    if c + 1 < CHUNKS:  # in flight while this chunk is multiplied
                        ahead = peek(chunk + BLOCK_K, mask_operand)
                acc_r = tl.dot(u_r[c], state, acc_r, input_precision=PRECISION)
                acc_z = tl.dot(u_z[c], state, acc_z, input_precision=PRECISION)
                if not TEXTBOOK:
                    acc_n = tl.dot(u_n[c], state, acc_n, input_precision=PRECISION)

            r = tl.sigmoid(a_r + total(acc_r, mask_h, SPLIT_K, PADDED))
            if TEXTBOOK:
                reset = r * h
                rh = rh_ptr + row * H_ROW
                if not SOLO:
                    publish(rh + own, reset, mask_row)
                z = tl.sigmoid(a_z + total(acc_z, mask_h, SPLIT_K, PADDED))
                acc_n = add_product(
                    acc_n, u_n, reset.to(dtype), rh + offs_operand, mask_operand,
                    deadline, error_ptr, BLOCK_K, CHUNKS, SPIN, SOLO, PRECISION,
                )  # fmt: skip
                n = tanh(a_n + b_n + total(acc_n, mask_h, SPLIT_K, PADDED))
                h_next = (1 - z) * h + z * n
            else:
                z = tl.sigmoid(a_z + total(acc_z, mask_h, SPLIT_K, PADDED))
                gh_n = b_n + total(acc_n, mask_h, SPLIT_K, PADDED)
                n = tanh(a_n + r * gh_n)
                h_next = (1 - z) * n + z * h
            publish(y_ptr + row * H_ROW + own, h_next, mask_row)
            h = tl.where(mask, h_next, h) if PACKED else h_next

            if SAVE:
                gates = gates_ptr + row * (G * H)
                tl.store(gates + own_gates, r.to(dtype), mask=mask)
                tl.store(gates + own_gates + H, z.to(dtype), mask=mask)
                tl.store(gates + own_gates + 2 * H, n.to(dtype), mask=mask)
                if not TEXTBOOK:
                    tl.store(gates + own_gates + 3 * H, gh_n.to(dtype), mask=mask)
            t += step
        mask = mask_h[:, None] & in_batch[None, :]
        tl.store(h_n_ptr + (d * B + row0) * H + own_h, h.to(dtype), mask=mask)
        row0 += tl.num_programs(1) * BLOCK_B


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
    save: bool,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence over gx (T, B, D, 3H) or (N, D, 3H), from h0 (D, B, H), with w_hh
    (D, 3H, H) and b_hh (D, 3H), all contiguous, as `reference.gru_forward` does.

    Returns y, h_n and, if `save`, the gates, which else come back empty."""
    (*shape, D, _), B, H = gx.shape, h0.shape[1], h0.shape[2]
    N, G = math.prod(shape), 3 if textbook else 4
    assert (H, D) == (plan.H, plan.D)

    rows = D, plan.row
    if plan.solo:  # the state stays in registers and nothing is waited for
        y = rh = gx.new_empty(N, *rows)
    else:
        y = unwritten(N + B, *rows, like=gx)
        rh = unwritten(N, *rows, like=gx) if textbook else y  # else it is not touched
    gates = gx.new_empty((*shape, D, G, H) if save else 0)
    h_n = gx.new_empty(D, B, H)
    arguments = gx, pad_hidden(w_hh, plan.H_pad), b_hh, h0, y, rh, gates, h_n
    switches = {
        "TEXTBOOK": textbook, "REVERSE": reverse, "BIDIRECTIONAL": bidirectional,
        "HAS_BIAS": b_hh is not None, "SAVE": save,
    }  # fmt: skip
    launch(_gru_forward_kernel, arguments, offsets, shape, B, plan, **switches)
    return y[:N, :, :H].reshape(*shape, D, H).contiguous(), h_n, gates
