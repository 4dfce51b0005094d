"""The persistent backward kernel and its launcher."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import reference
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
    steps_of_tile,
    unpacked,
    walks_forwards,
)


@gluon.jit
def _fetch_step(dy_ptr, gates_ptr, before_ptr, y_ptr, h0_ptr, scale_ptr, clip, row, running,
                before_row, before_running, left, in_tile, n_row_in, own_y, own_gates,
                D: gl.constexpr, TEXTBOOK: gl.constexpr, PACKED: gl.constexpr,
                FORM: gl.constexpr):  # fmt: skip
    """What a step of the walk reads: r, z, n, the state before, which is h0 for sequences that
    begin with it, gh_n (torch), dy, the scale and the state after; n for what is not there. left:
    how many steps there are from this one on."""
    H: gl.constexpr = FORM.H
    G: gl.constexpr = 3 if TEXTBOOK else 4
    if PACKED:
        mask = in_tile & (n_row_in < running)[None, :]
        is_first = (n_row_in >= before_running)[None, :]
    else:
        mask = in_tile & (left > 0)
        is_first = left <= 1
    gates = gates_ptr + row * (D * G * H) + own_gates
    own = row * (D * H) + own_y
    r, z, n = fetch3(gates, mask, H, FORM)
    gh_n = n
    dy = n
    scale = n
    after = n
    if dy_ptr is not None:
        dy = fetch(dy_ptr + own, mask, FORM)
    if not TEXTBOOK:
        gh_n = fetch(gates + 3 * H, mask, FORM)
    if before_ptr is not None:
        before = before_ptr + own
    else:
        before = gl.where(is_first, h0_ptr, y_ptr + before_row * (D * H)) + own_y
    before = fetch(before, mask, FORM)
    if scale_ptr is not None:
        scale = fetch(scale_ptr + own, mask, FORM)
    if clip is not None:
        after = fetch(y_ptr + own, mask, FORM)
    return r, z, n, before, gh_n, dy, scale, after


@gluon.jit
def _factors(saved, clip, dtype: gl.constexpr, TEXTBOOK: gl.constexpr, HAS_DY: gl.constexpr,
             SCALED: gl.constexpr, FORM: gl.constexpr):  # fmt: skip
    """All of a step that does not depend on dh: what makes of dh (textbook: da_r of d(r ⊙ h)) da_r,
    da_z and dgh_n; then, torch: da_n, and what of dh goes past the gates; textbook: what of
    d(r ⊙ h) goes to the state before, and what of dh. And dy, what makes of dh the scale's
    gradient, and where no gradient passes; r for what is not there."""
    r = unpacked(saved[0], dtype, FORM)
    z = unpacked(saved[1], dtype, FORM)
    n = unpacked(saved[2], dtype, FORM)
    h = unpacked(saved[3], dtype, FORM)
    dy = r
    to_scale = r
    is_clipped = r
    if HAS_DY:
        dy = unpacked(saved[5], dtype, FORM)
    if clip is not None:
        after = unpacked(saved[7], dtype, FORM)
        is_clipped = (after >= clip) | (after <= -clip)
    share = z if TEXTBOOK else 1 - z
    slope = z * (1 - z)
    kept = 1 - z if TEXTBOOK else z
    if SCALED:
        scale = unpacked(saved[6], dtype, FORM)
        to_scale = share * (n - h)
        share *= scale
        slope *= scale
        kept = 1 - share
    if TEXTBOOK:
        f = (h * r * (1 - r), (n - h) * slope, share * (1 - n * n), r, kept)
    else:
        a_n = share * (1 - n * n)
        a_r = a_n * unpacked(saved[4], dtype, FORM) * r * (1 - r)
        f = (a_r, (h - n) * slope, a_n * r, a_n, kept)
    return f + (dy, to_scale, is_clipped)


@gluon.jit(do_not_specialize=["T", "B", "rows", "wait_limit", "first_direction"],
           do_not_specialize_on_alignment=["dh_n_ptr", "offsets_ptr"])  # fmt: skip
def _gru_backward_kernel(
    dy_ptr,  # [N, D, H]           or None for 0
    dh_n_ptr,  # [D, B, H]           or None for 0
    w_hh_ptr,  # [D, 3, H_PAD, H_PAD]  transposed: rows are the columns of U
    h0_ptr,  # [B, D, H]
    y_ptr,  # [N, D, H]
    before_ptr,  # [N, D, H]           state entering each step, or None to have it from y and h0
    gates_ptr,  # [N, D, G, H]
    dgh_ptr,  # [N, D, 3, H_ROW]  exchanged: gradients of the recurrent products
    dgx_ptr,  # [N, D, 3, H]      gradients of gx; the textbook form's are those of dgh
    dh0_ptr,  # [D, B, H]
    dreset_ptr,  # [D, B, H]           or None: of reset_state, each sequence's share
    dscale_ptr,  # [N, D, H]
    resets_ptr,  # [D, words, B]       or None: bits, where a step was entered with the reset state
    scale_ptr,  # [N, D, H]           or None: of the candidate's share
    clip,  # of the state, or None
    offsets_ptr,  # [T + 1]             or None: where each step's rows begin, and N: PACKED
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
):
    PACKED: gl.constexpr = offsets_ptr is not None
    HAS_DY: gl.constexpr = dy_ptr is not None
    RESETS: gl.constexpr = resets_ptr is not None
    LEARNED: gl.constexpr = dreset_ptr is not None
    SCALED: gl.constexpr = scale_ptr is not None
    H: gl.constexpr = FORM.H
    H_ROW: gl.constexpr = FORM.H_ROW
    G: gl.constexpr = 3 if TEXTBOOK else 4
    SOLO: gl.constexpr = FORM.SOLO
    CHUNKS: gl.constexpr = FORM.CHUNKS
    SUMS: gl.constexpr = 2 if TEXTBOOK else 1
    WAITED: gl.constexpr = 2 if TEXTBOOK else 3  # gates, after the last of them is published
    # Make a step's factors, five to eight an element, a step ahead where a thread has few elements.
    EARLY: gl.constexpr = FORM.BLOCK_H * FORM.BLOCK_B <= 128 * FORM.WARPS
    AHEAD: gl.constexpr = 2 if EARLY else 1  # so many steps ahead is loaded
    L: gl.constexpr = FORM.out
    L_IN: gl.constexpr = FORM.loaded
    dtype: gl.constexpr = dgh_ptr.dtype.element_ty

    d = (first_direction + gl.program_id(2)).to(gl.int64)
    unit0 = gl.program_id(0) * FORM.BLOCK_H
    unit, n_row = own_units(unit0, 1, L, FORM)
    mask_h = unit < H
    PER_WORD: gl.constexpr = FORM.PER_WORD
    unit_in, n_row_in = own_units(unit0, PER_WORD, L_IN, FORM)  # of what is loaded each step
    mask_h_in = unit_in < H
    u_r, u_z, u_n = load_us(w_hh_ptr + d * (3 * FORM.H_PAD * FORM.H_PAD), unit0, FORM)
    parts, states, stages = shared_memory(dtype, SUMS, 3, FORM)

    # Against the direction of the forward pass.
    forwards = walks_forwards(d, HEADS, REVERSE, BIDIRECTIONAL)
    step = gl.where(forwards, -1, 1)
    h0_ptr += d * H
    y_ptr += d * H
    gates_ptr += d * (G * H)
    dgh_ptr += d * (3 * H_ROW)
    dgx_ptr += d * (3 * H)
    own_y = own_offsets(unit_in, D * H, L_IN, FORM)
    own_gates = own_offsets(unit_in, D * G * H, L_IN, FORM)
    own_dgh = own_offsets(unit, D * 3 * H_ROW, L, FORM)
    own_dgx = own_offsets(unit, D * 3 * H, L, FORM)
    own_h = own_offsets(unit, H, L, FORM)
    if HAS_DY:
        dy_ptr += d * H
    if RESETS:
        resets_ptr += d * ((T + 31) // 32 + 1) * B
        before_ptr += d * H
    own_dscale = 0
    if SCALED:
        scale_ptr += d * H
        dscale_ptr += d * H
        own_dscale = own_offsets(unit, D * H, L, FORM)

    first_row = gl.program_id(1).to(gl.int64) * rows
    for row0 in range(first_row, B, gl.num_programs(1).to(gl.int64) * rows):  # batch tiles in turn
        real = gl.minimum(rows, B - row0).to(gl.int32)
        in_tile = mask_h[:, None] & (n_row < real)[None, :]  # [BLOCK_H, BLOCK_B]
        in_tile_in = mask_h_in[:, None] & (n_row_in < real)[None, :]
        barrier()  # else the compiler, not knowing where a tile begins, puts one into its loop
        h_rows = (d * B + row0) * H
        if dh_n_ptr is not None:
            dh = gl.load(dh_n_ptr + h_rows + own_h, mask=in_tile, other=0.0).to(gl.float32)
        else:
            dh = gl.full([FORM.BLOCK_H, FORM.BLOCK_B], 0.0, gl.float32, L)
        dreset = gl.full([FORM.BLOCK_H, FORM.BLOCK_B], 0.0, gl.float32, L)
        h0 = h0_ptr + row0 * (D * H)
        awaited = awaited_offsets(awaited_rows(real - 1, FORM), D * 3 * H_ROW, FORM)

        steps = steps_of_tile(offsets_ptr, row0, T, PACKED)
        t = gl.where(forwards, steps - 1, 0)
        # Rows and how many of them run: of this step, of that which is loaded, of the one after it.
        row, running = rows_of_step(offsets_ptr, t, row0, T, B, PACKED)
        load_row, load_running = row, running
        after_row, after_running = rows_of_step(offsets_ptr, t + step, row0, T, B, PACKED)
        middle_row, middle_running = row, running
        if RESETS:
            at = gl.minimum(n_row, real - 1)
        for k in gl.static_range(AHEAD):
            saved = _fetch_step(
                dy_ptr, gates_ptr, before_ptr, y_ptr, h0, scale_ptr, clip, load_row, load_running,
                after_row, after_running, steps - k, in_tile_in, n_row_in, own_y, own_gates, D,
                TEXTBOOK, PACKED, FORM,
            )  # fmt: skip
            if k + 1 < AHEAD:
                f = _factors(saved, clip, dtype, TEXTBOOK, HAS_DY, SCALED, FORM)
            middle_row, middle_running = load_row, load_running
            load_row, load_running = after_row, after_running
            after_row, after_running = rows_of_step(
                offsets_ptr, t + step * (k + 2), row0, T, B, PACKED
            )

        # With resets 32 steps at a time. Of these all pairs, then the last one if they are odd.
        for block in (range if RESETS else gl.static_range)(0, steps if RESETS else 1, 32):
            until = steps
            if RESETS:
                until = gl.minimum(block + 32, steps)
                barrier()  # as before a tile
                bits = resets_of_block(resets_ptr + row0, block, at, B)
            pairs = until - until % 2
            for last in gl.static_range(2):
                for i in range(
                    pairs if last else block, until if last else pairs, 1 if last else 2
                ):
                    for half in gl.static_range(1 if last else 2):
                        place = parts[SUMS * half : SUMS * half + SUMS]
                        if PACKED:
                            end = gl.minimum(running, real)
                            mask = mask_h[:, None] & (n_row < end)[None, :]
                            awaited_now = awaited_offsets(
                                awaited_rows(end - 1, FORM), D * 3 * H_ROW, FORM
                            )
                        else:
                            mask = in_tile
                            awaited_now = awaited
                        if not EARLY:
                            f = _factors(saved, clip, dtype, TEXTBOOK, HAS_DY, SCALED, FORM)
                        # gates, publish
                        dh_later = dh
                        if HAS_DY:
                            dh += f[5]
                        if clip is not None:
                            dh = gl.where(f[7], 0.0, dh)
                        da_z = dh * f[1]
                        dgh_n = dh * f[2]
                        row_dgh = dgh_ptr + row * (D * 3 * H_ROW)
                        dgh = row_dgh + own_dgh
                        if SOLO:
                            states[3 * half + 1].store(da_z.to(dtype))
                            states[3 * half + 2].store(dgh_n.to(dtype))
                        if not TEXTBOOK:
                            da_r = dh * f[0]
                            if SOLO:
                                states[3 * half].store(da_r.to(dtype))
                            publish(dgh, da_r, mask, FORM)
                        publish(dgh + H_ROW, da_z, mask, FORM)
                        publish(dgh + 2 * H_ROW, dgh_n, mask, FORM)
                        if SCALED:
                            dscale = dscale_ptr + row * (D * H) + own_dscale
                            gl.store(dscale, (dh * f[6]).to(dtype), mask=mask)
                        if TEXTBOOK:
                            # wait, product, total: d(r ⊙ h), and the reset gate's share
                            if SOLO:
                                awaited_n = (states[3 * half + 2],)
                            else:
                                source = row_dgh + 2 * H_ROW + awaited_now
                                awaited_n = await_tiles(
                                    source, wait_limit, error_ptr, CHUNKS, 1, FORM
                                )
                            sums = product((u_n,), awaited_n, stages, place[1:2], FORM)
                            d_reset = total(sums[0], place[1], mask_h, FORM)
                            da_r = d_reset * f[0]
                            if SOLO:
                                states[3 * half].store(da_r.to(dtype))
                            publish(dgh, da_r, mask, FORM)
                            dh = dh * f[4] + d_reset * f[3]
                        else:
                            dgx = dgx_ptr + row * (D * 3 * H) + own_dgx
                            gl.store(dgx, da_r.to(dtype), mask=mask)
                            gl.store(dgx + H, da_z.to(dtype), mask=mask)
                            gl.store(dgx + 2 * H, (dh * f[3]).to(dtype), mask=mask)
                            dh = dh * f[4]
                        # The loads of a later step come before the wait: its first look, so early
                        # that it is in vain, would take from what L2 has for the looks of others.
                        if EARLY:
                            f = _factors(saved, clip, dtype, TEXTBOOK, HAS_DY, SCALED, FORM)
                        saved = _fetch_step(
                            dy_ptr, gates_ptr, before_ptr, y_ptr, h0, scale_ptr, clip, load_row,
                            load_running, after_row, after_running, steps - (i + half + AHEAD),
                            in_tile_in, n_row_in, own_y, own_gates, D, TEXTBOOK, PACKED,
                            FORM,
                        )  # fmt: skip
                        # wait
                        if SOLO:
                            tiles = states[3 * half : 3 * half + WAITED]
                        else:
                            source = row_dgh + awaited_now
                            tiles = await_tiles(
                                source, wait_limit, error_ptr, WAITED * CHUNKS, 1, FORM
                            )
                        # product
                        u = u_r + u_z if TEXTBOOK else u_r + u_z + u_n
                        sums = product((u,), tiles, stages, place[0:1], FORM)
                        # total
                        dh += total(sums[0], place[0], mask_h, FORM)
                        if RESETS:
                            is_reset = is_set(bits, half)[None, :]
                            if LEARNED:
                                dreset += gl.where(is_reset, dh, 0.0)
                            dh = gl.where(is_reset, 0.0, dh)
                        # on
                        if PACKED:
                            dh = gl.where(mask, dh, dh_later)
                            t += step
                            row, running = middle_row, middle_running
                            if AHEAD == 1:
                                row, running = load_row, load_running
                            middle_row, middle_running = load_row, load_running
                            load_row, load_running = after_row, after_running
                            after_row, after_running = rows_of_step(
                                offsets_ptr, t + step * (AHEAD + 1), row0, T, B, PACKED
                            )
                        else:
                            row += step * B
                            load_row += step * B
                            after_row = load_row + step * B
                    if RESETS and not last:
                        bits = bits >> 2
        gl.store(dh0_ptr + h_rows + own_h, dh.to(dh0_ptr.dtype.element_ty), mask=in_tile)
        if LEARNED:
            gl.store(dreset_ptr + h_rows + own_h, dreset.to(dtype), mask=in_tile)


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
    plan: LaunchPlan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk the recurrence back from dy, laid out as y, and dh_n (D, B, H), each None for zeros, all
    tensors contiguous and as `gru_forward` took and returned them, as `reference.gru_backward`
    does, and with what it returns."""
    *shape, D, H = y.shape
    B = h0.shape[1]
    assert (H, D) == (plan.H, plan.D)
    rows = *shape, D, 3, plan.row
    dgh = y.new_empty(rows) if plan.solo else unwritten(*rows, H=H, like=y)
    dgx = y.new_empty(0 if textbook else (*shape, D, 3 * H))
    dh0 = h0.new_empty(D, B, H)
    dreset_state = None if reset_state is None else y.new_empty(D, B, H)
    dscale = y.new_empty(0 if update_scale is None else y.shape)
    u = pad_hidden(w_hh, plan.H_pad, transposed=True)
    h0_rows, before = h0, None
    if resets is None:
        h0_rows = aligned(h0.to(y.dtype).transpose(0, 1))  # as y's
    else:
        before = reference.states_before(
            y, h0, offsets, reverse=reverse, bidirectional=bidirectional, heads=heads,
            resets=resets, reset_state=reset_state,
        )  # fmt: skip
    walk = {"HEADS": heads, "REVERSE": reverse, "BIDIRECTIONAL": bidirectional}
    arguments = (
        aligned(dy), dh_n, u, h0_rows, aligned(y), aligned(before), aligned(gates), dgh, dgx, dh0,
        dreset_state, dscale, packed_resets(resets, offsets, B, plan, against=True, **walk),
        aligned(update_scale), rounded(clip, y.dtype),
    )  # fmt: skip
    switches = {"TEXTBOOK": textbook, **walk}
    launch(_gru_backward_kernel, arguments, y, offsets, shape, B, plan, **switches)
    dgh = dgh[..., :H].reshape(*shape, D, 3 * H)  # a copy where there is padding
    dgx, dgh = (dgh, dgx) if textbook else (dgx, dgh)
    nothing = y.new_empty(0)
    return dgx, dgh, dh0, nothing if dreset_state is None else dreset_state, dscale
