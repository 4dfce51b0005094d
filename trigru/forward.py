"""The persistent forward kernel and its launcher."""

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .exchange import await_tiles, publish, unwritten
from .launch import launch, packed_resets, rounded
from .plan import LaunchPlan, aligned, pad_hidden
from .products import load_us, product, total
from .tiles import (
    awaited_offsets,
    awaited_rows,
    barrier,
    fetch,
    fetch3,
    is_set,
    own_offsets,
    own_units,
    resets_of_block,
    rows_of_step,
    shared_memory,
    sigmoid,
    sigmoids,
    steps_of_tile,
    tanh,
    unpacked,
    walks_forwards,
)


@gluon.jit
def _fetch_input(gx_ptr, scale_ptr, row, own_gx, own_scale, mask, D: gl.constexpr,
                 SCALED: gl.constexpr, FORM: gl.constexpr):  # fmt: skip
    """What a step reads: gx of the gates r, z, n and, if SCALED, the scale of the candidate."""
    H: gl.constexpr = FORM.H
    loaded = fetch3(gx_ptr + row * (D * 3 * H) + own_gx, mask, H, FORM)
    if SCALED:
        loaded = loaded + (fetch(scale_ptr + row * (D * H) + own_scale, mask, FORM),)
    return loaded


@gluon.jit(
    do_not_specialize=["T", "B", "rows", "wait_limit", "first_direction"],
    # Read once a launch, and often from a view: any offset is the same kernel.
    do_not_specialize_on_alignment=["b_hh_ptr", "h0_ptr", "reset_state_ptr", "offsets_ptr"],
)
def _gru_forward_kernel(
    gx_ptr,  # [N, D, 3, H]     input projection of the gates r, z, n
    w_hh_ptr,  # [D, 3, H_PAD, H_PAD]
    b_hh_ptr,  # [D, 3, H]        or None
    h0_ptr,  # [D, B, H]
    y_ptr,  # [N + 2B, D, H_ROW] exchanged: the state after each step; h0; the reset state, B times
    rh_ptr,  # [N, D, H_ROW]    exchanged: r ⊙ h, textbook only
    gates_ptr,  # [N, D, G, H]     written if SAVE: r, z, n and (torch) gh_n
    h_n_ptr,  # [D, B, H]
    resets_ptr,  # [D, words, B]    or None: bits, where a step is entered with the reset state
    reset_state_ptr,  # [D, H]           or None for 0
    scale_ptr,  # [N, D, H]        or None: of the candidate's share
    clip,  # of the state, or None
    offsets_ptr,  # [T + 1]          or None: where each step's rows begin, and N: PACKED
    error_ptr,
    T,
    B,
    rows,  # of a program's tile, at most BLOCK_B
    wait_limit,  # polls
    first_direction,
    D: gl.constexpr,
    FORM: gl.constexpr,
    TEXTBOOK: gl.constexpr,
    HEADS: gl.constexpr,
    REVERSE: gl.constexpr,
    BIDIRECTIONAL: gl.constexpr,
    SAVE: gl.constexpr,
):
    PACKED: gl.constexpr = offsets_ptr is not None
    RESETS: gl.constexpr = resets_ptr is not None
    SCALED: gl.constexpr = scale_ptr is not None
    H: gl.constexpr = FORM.H
    H_ROW: gl.constexpr = FORM.H_ROW
    G: gl.constexpr = 3 if TEXTBOOK else 4
    SOLO: gl.constexpr = FORM.SOLO
    CHUNKS: gl.constexpr = FORM.CHUNKS
    GATES: gl.constexpr = 2 if TEXTBOOK else 3  # that are multiplied by the state
    # Whether r ⊙ h goes out before there is z, which then is made while it is on its way.
    R_FIRST: gl.constexpr = TEXTBOOK and FORM.SPLIT_K > 1
    # So many steps ahead gx is loaded; where nothing is waited for, one step is too short.
    AHEAD: gl.constexpr = 2 if SOLO else 1
    L: gl.constexpr = FORM.out
    L_IN: gl.constexpr = FORM.loaded
    dtype: gl.constexpr = y_ptr.dtype.element_ty

    d = (first_direction + gl.program_id(2)).to(gl.int64)
    unit0 = gl.program_id(0) * FORM.BLOCK_H
    unit, n_row = own_units(unit0, 1, L, FORM)
    mask_h = unit < H
    PER_WORD: gl.constexpr = FORM.PER_WORD
    unit_in, n_row_in = own_units(unit0, PER_WORD, L_IN, FORM)  # of what is loaded each step
    mask_h_in = unit_in < H
    u_r, u_z, u_n = load_us(w_hh_ptr + d * (3 * FORM.H_PAD * FORM.H_PAD), unit0, FORM)
    parts, states, stages = shared_memory(dtype, 3, 2 if TEXTBOOK else 1, FORM)
    b_r = gl.full([FORM.BLOCK_H], 0.0, gl.float32, gl.SliceLayout(1, L))[:, None]
    b_z = b_r
    b_n = b_r
    reset_state = b_r
    if b_hh_ptr is not None:
        bias = b_hh_ptr + d * (3 * H) + unit
        b_r = gl.load(bias, mask=mask_h, other=0.0).to(gl.float32)[:, None]
        b_z = gl.load(bias + H, mask=mask_h, other=0.0).to(gl.float32)[:, None]
        b_n = gl.load(bias + 2 * H, mask=mask_h, other=0.0).to(gl.float32)[:, None]
    if reset_state_ptr is not None:
        reset_state = gl.load(reset_state_ptr + d * H + unit, mask=mask_h, other=0.0)
        reset_state = reset_state.to(gl.float32)[:, None]

    N = gl.load(offsets_ptr + T) if PACKED else T.to(gl.int64) * B
    forwards = walks_forwards(d, HEADS, REVERSE, BIDIRECTIONAL)
    step = gl.where(forwards, 1, -1)
    gx_ptr += d * (3 * H)
    y_ptr += d * H_ROW
    rh_ptr += d * H_ROW
    gates_ptr += d * (G * H)
    own_gx = own_offsets(unit_in, D * 3 * H, L_IN, FORM)
    own_y = own_offsets(unit, D * H_ROW, L, FORM)
    own_gates = own_offsets(unit, D * G * H, L, FORM)
    own_h = own_offsets(unit, H, L, FORM)
    own_scale = 0
    if SCALED:
        scale_ptr += d * H
        own_scale = own_offsets(unit_in, D * H, L_IN, FORM)
    if RESETS:
        resets_ptr += d * ((T + 31) // 32 + 1) * B

    first_row = gl.program_id(1).to(gl.int64) * rows
    for row0 in range(first_row, B, gl.num_programs(1).to(gl.int64) * rows):  # batch tiles in turn
        real = gl.minimum(rows, B - row0).to(gl.int32)
        mask = mask_h[:, None] & (n_row < real)[None, :]  # [BLOCK_H, BLOCK_B]
        barrier()  # else the compiler, not knowing where a tile begins, puts one into its loop
        h_rows = (d * B + row0) * H
        h = gl.load(h0_ptr + h_rows + own_h, mask=mask, other=0.0).to(gl.float32)
        before = N + row0  # the row of the state before a step: h0's in the first one
        row_reset = N + B + row0
        if not SOLO:
            publish(y_ptr + before * (D * H_ROW) + own_y, h, mask, FORM)
            if RESETS:
                ptrs = y_ptr + row_reset * (D * H_ROW) + own_y
                publish(ptrs, gl.where(mask, reset_state, 0.0), mask, FORM)
        awaited = awaited_offsets(awaited_rows(real - 1, FORM), D * H_ROW, FORM)

        steps = steps_of_tile(offsets_ptr, row0, T, PACKED)
        t = gl.where(forwards, 0, steps - 1)
        # Rows and how many of them run: of this step, of that which is loaded.
        row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
        load_row, load_running = row, running
        middle_row, middle_running = row, running
        running_before = 0 * running
        if PACKED:
            mask = mask_h[:, None] & (n_row < gl.minimum(running, real))[None, :]
        if RESETS:
            words_ptr = resets_ptr + row0
            at_own = gl.minimum(n_row, real - 1)
            at_in = awaited_rows(real - 1, FORM)
            h = gl.where(is_set(gl.load(words_ptr + at_own), 0)[None, :], reset_state, h)
            is_reset = is_set(gl.load(words_ptr + at_in), 0)
            offset_reset = row_reset * (D * H_ROW)
            offset_before = gl.where(is_reset, offset_reset, before * (D * H_ROW))
        if SOLO:
            states[0].store(h.to(dtype))
        mask_in = mask_h_in[:, None] & (n_row_in < real)[None, :]
        for k in gl.static_range(AHEAD):
            if PACKED:
                load_end = gl.minimum(load_running, real)
                load_mask = mask_h_in[:, None] & (n_row_in < load_end)[None, :]
            else:
                load_mask = mask_in & (k < steps)
            loaded = _fetch_input(
                gx_ptr, scale_ptr, load_row, own_gx, own_scale, load_mask, D, SCALED, FORM
            )
            if k == 0:
                gx = loaded
            middle_row, middle_running = load_row, load_running
            load_row, load_running = rows_of_step(
                offsets_ptr, t + step * (k + 1), row0, T, B, PACKED
            )

        # With resets 32 steps at a time. Of these all pairs, then the last one if they are odd.
        for block in (range if RESETS else gl.static_range)(0, steps if RESETS else 1, 32):
            until = steps
            if RESETS:
                until = gl.minimum(block + 32, steps)
                barrier()  # as before a tile
                bits = resets_of_block(words_ptr, block, at_own, B)
                bits_in = resets_of_block(words_ptr, block, at_in, B)
            pairs = until - until % 2
            for last in gl.static_range(2):
                for i in range(
                    pairs if last else block, until if last else pairs, 1 if last else 2
                ):
                    for half in gl.static_range(1 if last else 2):
                        # wait
                        if SOLO:
                            state = (states[half],)
                        else:
                            source = y_ptr + before * (D * H_ROW) + awaited
                            if PACKED:
                                # Of sequences that begin with this step h0 is the state before.
                                at = awaited_rows(gl.minimum(running, real) - 1, FORM)
                                rows_before = gl.where(at < running_before, before, N + row0) + at
                                if RESETS:
                                    rows_before = gl.where(is_reset, row_reset + at, rows_before)
                                source = y_ptr + awaited_offsets(rows_before, D * H_ROW, FORM)
                            elif RESETS:
                                source = y_ptr + offset_before[None, None, :] + awaited
                            state = await_tiles(source, wait_limit, error_ptr, CHUNKS, GATES, FORM)
                        a_r = unpacked(gx[0], dtype, FORM) + b_r
                        a_z = unpacked(gx[1], dtype, FORM) + b_z
                        a_n = unpacked(gx[2], dtype, FORM)
                        # The input of a later step under way.
                        if PACKED:
                            load_end = gl.minimum(load_running, real)
                            load_mask = mask_h_in[:, None] & (n_row_in < load_end)[None, :]
                        else:
                            load_mask = mask_in & (i + half + AHEAD < steps)
                        share = None
                        if SCALED:
                            share = unpacked(gx[3], dtype, FORM)
                        if SOLO:
                            gx = loaded
                            loaded = _fetch_input(
                                gx_ptr, scale_ptr, load_row, own_gx, own_scale, load_mask, D,
                                SCALED, FORM,
                            )  # fmt: skip
                        # product
                        us = (u_r, u_z) if TEXTBOOK else (u_r, u_z, u_n)
                        place = parts[3 * half : 3 * half + 3]
                        sums = product(us, state, stages, place, FORM)
                        # gates
                        h_before = h
                        if R_FIRST:
                            r = sigmoid(a_r + total(sums[0], place[0], mask_h, FORM))
                        else:
                            gh_r = total(sums[0], place[0], mask_h, FORM)
                            gh_z = total(sums[1], place[1], mask_h, FORM)
                            r, z = sigmoids(a_r + gh_r, a_z + gh_z, FORM)
                        if TEXTBOOK:
                            reset = r * h
                            if SOLO:
                                states[2 + half].store(reset.to(dtype))
                                reset_tiles = (states[2 + half],)
                            else:
                                rh = rh_ptr + row * (D * H_ROW)
                                publish(rh + own_y, reset, mask, FORM)
                            if R_FIRST:
                                z = sigmoid(a_z + total(sums[1], place[1], mask_h, FORM))
                            if not SOLO:
                                source = rh + awaited
                                if PACKED:
                                    source = rh + awaited_offsets(at, D * H_ROW, FORM)
                                reset_tiles = await_tiles(
                                    source, wait_limit, error_ptr, CHUNKS, 1, FORM
                                )
                            sums_n = product((u_n,), reset_tiles, stages, place[2:3], FORM)
                            n = tanh(a_n + b_n + total(sums_n[0], place[2], mask_h, FORM), FORM)
                        else:
                            gh_n = b_n + total(sums[2], place[2], mask_h, FORM)
                            n = tanh(a_n + r * gh_n, FORM)
                        if SCALED:
                            share *= z if TEXTBOOK else 1 - z
                            h = (1 - share) * h + share * n
                        elif TEXTBOOK:
                            h = (1 - z) * h + z * n
                        else:
                            h = n + z * (h - n)
                        if clip is not None:  # a NaN stays
                            h = gl.where(gl.abs(h) > clip, gl.where(h > 0, clip, -clip), h)
                        if PACKED:
                            h = gl.where(mask, h, h_before)
                        entering = h  # the next step
                        if RESETS:
                            is_reset = is_set(bits_in, half)
                            offset_before = gl.where(is_reset, offset_reset, row * (D * H_ROW))
                            entering = gl.where(is_set(bits, half)[None, :], reset_state, h)
                        # publish
                        y = y_ptr + row * (D * H_ROW) + own_y
                        if SOLO:
                            states[1 - half].store(entering.to(dtype))
                        publish(y, h, mask, FORM)
                        h = entering
                        if not SOLO:
                            # Not before all of this step's is converted, in front of which the
                            # compiler would put it: scoreboards are shared, so that it would be
                            # waited for.
                            gx = _fetch_input(
                                gx_ptr, scale_ptr, load_row, own_gx, own_scale, load_mask, D,
                                SCALED, FORM,
                            )  # fmt: skip
                        if SAVE:
                            gates = gates_ptr + row * (D * G * H) + own_gates
                            gl.store(gates, r.to(dtype), mask=mask)
                            gl.store(gates + H, z.to(dtype), mask=mask)
                            gl.store(gates + 2 * H, n.to(dtype), mask=mask)
                            if not TEXTBOOK:
                                gl.store(gates + 3 * H, gh_n.to(dtype), mask=mask)
                        # on
                        before = row
                        if PACKED:
                            t += step
                            running_before = running
                            row, running = middle_row, middle_running
                            if AHEAD == 1:
                                row, running = load_row, load_running
                            middle_row, middle_running = load_row, load_running
                            load_row, load_running = rows_of_step(
                                offsets_ptr, t + step * AHEAD, row0, T, B, PACKED
                            )
                            mask = mask_h[:, None] & (n_row < gl.minimum(running, real))[None, :]
                        else:
                            row += step * B
                            # The same row twice: each is the way that takes fewer registers there.
                            load_row = row + step * B if FORM.STAGES > 0 else load_row + step * B
                    if RESETS and not last:
                        bits = bits >> 2
                        bits_in = bits_in >> 2
        mask = mask_h[:, None] & (n_row < real)[None, :]
        gl.store(h_n_ptr + h_rows + own_h, h.to(h_n_ptr.dtype.element_ty), mask=mask)


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
    if plan.solo:  # the state stays in the program and nothing is waited for
        y = rh = gx.new_empty(N, *rows)
    else:
        y = unwritten(N + (B if resets is None else 2 * B), *rows, H=H, like=gx)
        rh = unwritten(N, *rows, H=H, like=gx) if textbook else y  # else it is not touched
    gates = gx.new_empty((*shape, D, G, H) if save else 0)
    h_n = h0.new_empty(D, B, H)
    walk = {"HEADS": heads, "REVERSE": reverse, "BIDIRECTIONAL": bidirectional}
    arguments = (
        aligned(gx), pad_hidden(w_hh, plan.H_pad), b_hh, h0, y, rh, gates, h_n,
        packed_resets(resets, offsets, B, plan, False, **walk), reset_state, aligned(update_scale),
        rounded(clip, gx.dtype),
    )  # fmt: skip
    switches = {"TEXTBOOK": textbook, "SAVE": save, **walk}
    launch(_gru_forward_kernel, arguments, gx, offsets, shape, B, plan, **switches)
    return y[:N, :, :H].reshape(*shape, D, H).contiguous(), h_n, gates
