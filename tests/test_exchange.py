"""How programs hand elements to each other: the real waits, executed by the emulator."""

import sys

import pytest
import torch
from emulator import Emulator, why_not
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from trigru.exchange import await_tiles, publish, settle, unwritten
from trigru.form import Form
from trigru.launch import compile_options
from trigru.tiles import awaited_offsets, awaited_rows, own_offsets

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = {2: torch.int16, 4: torch.int32}
REGIMES = ("latency", "latency, many", "throughput", "throughput, 8 warps")  # many vectors a wait
CASES = pytest.mark.parametrize(
    ("sm", "regime", "dtype"),
    [(sm, r, dtype) for sm in (80, 90) for r in REGIMES for dtype in DTYPES],
    ids=str,
)
# Halves of words that a test for the sentinel, all bits one, could take for it or for its absence
HALVES = [0, 0, 1, 0x7FFF, 0x8000, 0xFF00, 0xFFFD, 0xFFFE, 0xFFFE, 0xFFFF, 0xFFFF]
LIMIT = 20_000  # polls: later than anything that arrives
NOTHING = -2  # no element is lost


@gluon.jit(do_not_specialize=["lost", "limit"])
def _exchange_kernel(source_ptr, y_ptr, out_ptr, error_ptr, lost, limit, FORM: gl.constexpr):
    """Program 0 publishes all of the source but elements `lost` and `lost` + 1; program 1 awaits
    all, the chunks one after another where the form has stages."""
    if gl.program_id(0) == 0:
        L: gl.constexpr = FORM.out
        for unit0 in range(0, FORM.H_PAD, FORM.BLOCK_H):
            unit = unit0 + gl.arange(0, FORM.BLOCK_H, gl.SliceLayout(1, L))
            own = own_offsets(unit, FORM.H_PAD, L, FORM)  # [BLOCK_H, BLOCK_B]
            publish(y_ptr + own, gl.load(source_ptr + own), (own < lost) | (own > lost + 1), FORM)
    else:
        offsets = awaited_offsets(awaited_rows(FORM.BLOCK_B - 1, FORM), FORM.H_PAD, FORM)
        tiles = await_tiles(y_ptr + offsets, limit, error_ptr, FORM.CHUNKS, 3, FORM)
        CHUNKS: gl.constexpr = FORM.CHUNKS
        for c in gl.static_range(CHUNKS):
            if FORM.STAGES == 0:
                tile = tiles[c]
            elif c == 0:
                tile = tiles[0]
            else:
                tile = settle(tiles[1][c - 1], y_ptr + offsets, limit, error_ptr, c, FORM)
            gl.store(out_ptr + c * (FORM.H_PAD // FORM.CHUNKS) + offsets, tile)


def form_of(sm, regime, dtype):
    bits, chunks = 8 * dtype.itemsize, 8 if "many" in regime else 2
    how = {"WARPS": 4, "BITS": bits, "CHUNKS": chunks, "NEWER": sm >= 90}
    if "latency" in regime:  # the least that can be multiplied at once
        H = chunks * 4 * 512 // bits
        return Form(H, H, 16, 8, SPLIT_K=4, **how)
    H = chunks * 128  # two vectors a thread, or four; of 8 warps, two share rows
    how["WARPS"] = 8 if "8 warps" in regime else 4
    return Form(H, H, 8 * how["WARPS"], 16, STAGES=2, U_SHARED=chunks, **how)


def awaited(source, form, emulator, y=None, lost=NOTHING, limit=LIMIT, flag=0):
    """What program 1 has in the end, and the error flag."""
    y = unwritten(*source.shape, H=form.H, like=source) if y is None else y
    out, error = torch.empty_like(source), torch.tensor([flag], dtype=torch.int32)
    emulator.kernels = ((sys.modules[__name__], "_exchange_kernel"),)
    with emulator:
        _exchange_kernel[(2, 1, 1)](
            source, y, out, error, lost, limit, FORM=form, num_warps=form.WARPS,
            launch_cooperative_grid=True, **compile_options(),
        )  # fmt: skip
    assert all(result.finished for result in emulator.results)
    return bits_of(out), error.item()


def bits_of(tensor):
    return tensor.view(INTEGERS[tensor.itemsize])


def special(form, dtype, seed=0):
    """Rows of a tile, of special bits."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.tensor(HALVES, dtype=torch.int32).to(torch.int16)
    shape = form.BLOCK_B, form.H * dtype.itemsize // 2
    return halves[torch.randint(len(halves), shape, generator=generator)].view(dtype)


def published(source):
    """As it arrives: the sentinel has become another NaN."""
    bits = bits_of(source)
    return torch.where(bits == -1, -2, bits)


@gluon.jit
def _offsets_kernel(out_ptr, STRIDE: gl.constexpr, FORM: gl.constexpr):
    L: gl.constexpr = FORM.out
    unit = gl.arange(0, FORM.BLOCK_H, gl.SliceLayout(1, L))
    own = own_offsets(unit, STRIDE, L, FORM)
    gl.store(out_ptr + own_offsets(unit, FORM.BLOCK_H, L, FORM), own)


@pytest.mark.parametrize("stride", [100, 2**28, 2**29, 2**40])
def test_own_offsets_of_any_stride(stride):
    """Up to 2³² elements in all they are made in 32 bits."""
    form = form_of(90, "throughput", torch.bfloat16)  # 16 rows
    out = torch.zeros(form.BLOCK_B, form.BLOCK_H, dtype=torch.int64)
    emulator = Emulator()
    emulator.kernels = ((sys.modules[__name__], "_offsets_kernel"),)
    with emulator:
        _offsets_kernel[(1, 1, 1)](
            out, STRIDE=stride, FORM=form, num_warps=form.WARPS, **compile_options()
        )
    rows, units = torch.arange(form.BLOCK_B), torch.arange(form.BLOCK_H)
    assert torch.equal(out, rows[:, None] * stride + units)
    assert emulator.faults == []


@CASES
def test_a_wait_ends_with_all_of_the_tile(sm, regime, dtype):
    form = form_of(sm, regime, dtype)
    for seed in range(8):
        source, emulator = special(form, dtype, seed), Emulator(sm, seed=seed)
        out, error = awaited(source, form, emulator)
        assert torch.equal(out, published(source)) and not error
        assert emulator.faults == []


@CASES
def test_a_tile_that_had_arrived_is_looked_at_once(sm, regime, dtype):
    """Whatever the limit, and whoever has given up."""
    form = form_of(sm, regime, dtype)
    there = published(special(form, dtype)).view(dtype)
    for flag in (0, 1):
        out, error = awaited(
            there, form, Emulator(sm, missing=0), there.clone(), limit=1, flag=flag
        )
        assert torch.equal(out, bits_of(there)) and error == flag


@CASES
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_wait_for_what_never_arrives_sets_the_flag(sm, regime, dtype, chunk):
    """And the sentinel is left where it was awaited, and nowhere else."""
    form = form_of(sm, regime, dtype)
    source, lost = special(form, dtype), 3 * form.H + chunk * form.H // 2 + 6
    out, error = awaited(source, form, Emulator(sm, seed=chunk), lost=lost)
    expected = published(source)
    expected.view(-1)[lost : lost + 2] = -1
    assert error == 1 and torch.equal(out, expected)


@CASES
def test_waits_are_bounded_and_short_once_another_has_given_up(sm, regime, dtype):
    """Instructions tell how often was looked, as nothing runs beside the wait."""
    form = form_of(sm, regime, dtype)
    there = published(special(form, dtype)).view(dtype)
    bits_of(there).view(-1)[-2:] = -1  # of the last chunk

    def instructions(limit, flag):
        emulator = Emulator(sm, missing=0)
        out, error = awaited(there, form, emulator, there.clone(), limit=limit, flag=flag)
        assert error == 1 and torch.equal(out, bits_of(there))
        return emulator.results[0].instructions

    of_64, of_65, of_640 = (instructions(limit, 0) for limit in (64, 65, 640))
    poll = of_65 - of_64
    assert poll > 0 and 576 * poll <= of_640 - of_64 < 577 * poll + 10 * 16  # every 64th asks more
    assert abs(instructions(LIMIT, 1) - of_64) < poll
