"""The persistent forward kernel and its launcher."""

import triton
import triton.language as tl
from torch import Tensor

from . import exchange
from .exchange import deadline_from_now, peek, publish, settle
from .launch import launch
from .plan import LaunchPlan, pad_hidden
from .tiles import add_product, load_u, operand, operand_mask, operand_offsets, tanh, total, zeros


@triton.jit(do_not_specialize=["T", "B", "wait_limit", "first_direction"])
def _gru_forward_kernel(
    gx_ptr,  # [T, B, D, 3, H]    input projection of the gates r, z, n
    w_hh_ptr,  # [D, 3, H_PAD, H_PAD]
    b_hh_ptr,  # [D, 3, H]          read if HAS_BIAS
    h0_ptr,  # [D, B, H]
    h0_shared_ptr,  # [B, D, H_ROW]      exchanged: h0, so that the first step is like any other
    y_ptr,  # [T, B, D, H_ROW]   exchanged: the state after each step
    rh_ptr,  # [T, B, D, H_ROW]   exchanged: r ⊙ h, textbook only
    gates_ptr,  # [T, B, D, G, H]    written if SAVE: r, z, n and (torch) gh_n
    h_n_ptr,  # [D, B, H]
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

    # The second direction of a layer walks backwards in time.
    forwards = d < 0 if REVERSE else d == 0
    step = tl.where(forwards, 1, -1).to(tl.int64) * B * D  # in rows [D] of one batch element
    first = tl.where(forwards, 0, T - 1).to(tl.int64) * B * D

    own = offs_b[None, :] * (D * H_ROW) + offs_h[:, None]  # [BLOCK_H, BLOCK_B]
    own_gx = offs_b[None, :] * (D * 3 * H) + offs_h[:, None]
    own_gates = offs_b[None, :] * (D * G * H) + offs_h[:, None]
    own_h = offs_b[None, :] * H + offs_h[:, None]
    offs_operand = operand_offsets(offs_b, D * H_ROW, BLOCK_K, SPLIT_K)

    row0 = tl.program_id(1).to(tl.int64) * BLOCK_B
    while row0 < B:  # the batch tiles of this program, one after another
        mask_b = row0 + offs_b < B
        mask = mask_h[:, None] & mask_b[None, :]  # [BLOCK_H, BLOCK_B]
        mask_row = (offs_h < H_ROW)[:, None] & mask_b[None, :]  # with the padding that is exchanged
        mask_operand = operand_mask(mask_b, SPLIT_K)

        gx = gx_ptr + (first + row0 * D + d) * (3 * H)
        y = y_ptr + (first + row0 * D + d) * H_ROW
        rh = rh_ptr + (first + row0 * D + d) * H_ROW
        gates = gates_ptr + (first + row0 * D + d) * (G * H)
        source = h0_shared_ptr + (row0 * D + d) * H_ROW  # where the previous state is read from

        h = tl.load(h0_ptr + (d * B + row0) * H + own_h, mask=mask, other=0.0).to(tl.float32)
        if not SOLO:
            publish(source + own, h, mask_row)
        gx_r = tl.load(gx + own_gx, mask=mask, other=0.0)
        gx_z = tl.load(gx + own_gx + H, mask=mask, other=0.0)
        gx_n = tl.load(gx + own_gx + 2 * H, mask=mask, other=0.0)

        for t in range(T):
            a_r = gx_r.to(tl.float32) + b_r
            a_z = gx_z.to(tl.float32) + b_z
            a_n = gx_n.to(tl.float32)
            # The next step's input does not depend on the exchange: have it under way meanwhile.
            gx += step * (3 * H)
            mask_next = mask_h[:, None] & (row0 + offs_b < tl.where(t + 1 < T, B, 0))[None, :]
            gx_r = tl.load(gx + own_gx, mask=mask_next, other=0.0)
            gx_z = tl.load(gx + own_gx + H, mask=mask_next, other=0.0)
            gx_n = tl.load(gx + own_gx + 2 * H, mask=mask_next, other=0.0)

            acc_r = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            acc_z = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            acc_n = zeros(BLOCK_H, BLOCK_B, SPLIT_K)
            if SOLO:
                state = operand(h.to(dtype), PRECISION)
            else:
                ahead = peek(source + offs_operand, mask_operand)
            for c in tl.static_range(CHUNKS):
                if not SOLO:
                    chunk = source + offs_operand + c * BLOCK_K
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
                publish(rh + own, reset, mask_row)
                z = tl.sigmoid(a_z + total(acc_z, mask_h, SPLIT_K, PADDED))
                acc_n = add_product(
                    acc_n, u_n, reset.to(dtype), rh + offs_operand, mask_operand,
                    deadline, error_ptr, BLOCK_K, CHUNKS, SPIN, SOLO, PRECISION,
                )  # fmt: skip
                n = tanh(a_n + b_n + total(acc_n, mask_h, SPLIT_K, PADDED))
                h = (1 - z) * h + z * n
            else:
                z = tl.sigmoid(a_z + total(acc_z, mask_h, SPLIT_K, PADDED))
                gh_n = b_n + total(acc_n, mask_h, SPLIT_K, PADDED)
                n = tanh(a_n + r * gh_n)
                h = (1 - z) * n + z * h
            publish(y + own, h, mask_row)

            if SAVE:
                tl.store(gates + own_gates, r.to(dtype), mask=mask)
                tl.store(gates + own_gates + H, z.to(dtype), mask=mask)
                tl.store(gates + own_gates + 2 * H, n.to(dtype), mask=mask)
                if not TEXTBOOK:
                    tl.store(gates + own_gates + 3 * H, gh_n.to(dtype), mask=mask)
            source = y
            y += step * H_ROW
            rh += step * H_ROW
            gates += step * (G * H)
        tl.store(h_n_ptr + (d * B + row0) * H + own_h, h.to(dtype), mask=mask)
        row0 += tl.num_programs(1) * BLOCK_B


def gru_forward(
    gx: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    *,
    textbook: bool,
    reverse: bool,
    save: bool,
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence over gx (T, B, D, 3H) from h0 (D, B, H) with w_hh (D, 3H, H) and b_hh
    (D, 3H), all contiguous. With D = 2 the second direction runs backwards in time; with D = 1,
    `reverse` says so.

    Returns y (T, B, D, H), h_n (D, B, H) and, if `save`, what the backward pass needs: the gates
    (T, B, D, G, H), G = 4 (r, z, n, gh_n) or 3 in the textbook form, which also needs r ⊙ h
    (T, B, D, H). What is not saved comes back empty."""
    T, B, D, H = *gx.shape[:3], h0.shape[-1]
    assert (H, D) == (plan.H, plan.D)

    def exchanged(*shape: int) -> Tensor:
        """In a solo launch the state stays in registers and nothing is waited for."""
        return gx.new_empty(shape) if plan.solo else exchange.unwritten(*shape, like=gx)

    y = exchanged(T, B, D, plan.row)
    h0_shared = gx.new_empty(0) if plan.solo else exchanged(B, D, plan.row)
    rh = exchanged(T, B, D, plan.row) if textbook else gx.new_empty(0)
    gates = gx.new_empty((T, B, D, 3 if textbook else 4, H) if save else 0)
    h_n = gx.new_empty(D, B, H)
    arguments = (
        gx, pad_hidden(w_hh, plan.H_pad), b_hh, h0, h0_shared, y, rh, gates, h_n,
    )  # fmt: skip
    switches = {
        "TEXTBOOK": textbook, "REVERSE": reverse, "HAS_BIAS": b_hh is not None, "SAVE": save,
    }  # fmt: skip
    launch(_gru_forward_kernel, arguments, T, B, plan, **switches)
    if plan.row != H:
        y, rh = y[..., :H].contiguous(), rh[..., :H].contiguous()
    return y, h_n, gates, rh if save else gx.new_empty(0)
