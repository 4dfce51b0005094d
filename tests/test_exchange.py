"""How programs hand elements to each other: the real waits, executed by the emulator."""

import sys

import pytest
import torch
import triton
import triton.language as tl
from emulator import Emulator, why_not

from trigru.exchange import deadline_from_now, peek, publish, settle, unwritten
from trigru.launch import compile_options

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

DTYPES = {16: torch.float16, 32: torch.float32}
INTEGERS = {16: torch.int16, 32: torch.int32}
CASES = pytest.mark.parametrize(
    ("sm", "bits", "vectors"), [(sm, b, v) for sm in (80, 90) for b in (16, 32) for v in (1, 2, 8)]
)
# Halves of words that a test for the sentinel, all bits one, could take for it or for its absence
HALVES = [0, 0, 1, 0x7FFF, 0x8000, 0xFF00, 0xFFFD, 0xFFFE, 0xFFFE, 0xFFFF, 0xFFFF]
LIMIT, WARPS = 1_000_000, 2


@triton.jit(do_not_specialize=["never", "limit"])
def _hand_over_kernel(source_ptr, y_ptr, out_ptr, error_ptr, never, limit, SIZE: tl.constexpr,
                      SPIN: tl.constexpr):  # fmt: skip
    """Program 0 publishes all of the source but its first elements; program 1 awaits all."""
    offs = tl.arange(0, SIZE)  # [SIZE]
    if tl.program_id(0) == 0:
        publish(y_ptr + offs, tl.load(source_ptr + offs), offs >= never)
    else:
        deadline = deadline_from_now(limit, SPIN)
        ahead = peek(y_ptr + offs, offs < SIZE)
        tile = settle(ahead, y_ptr + offs, offs < SIZE, deadline, error_ptr, SPIN)
        tl.store(out_ptr + offs, tile)


def awaited(source, emulator, y=None, never=0, limit=LIMIT):
    """What program 1 has in the end, and the error flag."""
    y = unwritten(len(source), like=source) if y is None else y
    out, error = torch.empty_like(source), torch.zeros(1, dtype=torch.int32)
    emulator.kernels = ((sys.modules[__name__], "_hand_over_kernel"),)
    with emulator:
        _hand_over_kernel[(2, 1, 1)](
            source, y, out, error, never, limit, SIZE=len(source),
            SPIN=len(source) // (32 * WARPS), num_warps=WARPS, **compile_options(),
        )  # fmt: skip
    assert all(result.finished for result in emulator.results)
    return out.view(INTEGERS[8 * out.itemsize]), error.item()


def tile(bits, vectors, seed=0):
    """As many vectors for each thread; of special bits."""
    generator = torch.Generator().manual_seed(seed)
    size = 32 * WARPS * vectors * 16 // 2
    halves = torch.tensor(HALVES, dtype=torch.int32).to(torch.int16)
    picked = halves[torch.randint(len(halves), (size,), generator=generator)]
    return picked.view(DTYPES[bits])


def canonical(source):
    """As published: the sentinel becomes another NaN."""
    bits = source.view(INTEGERS[8 * source.itemsize])
    return torch.where(bits == -1, -2, bits)


@CASES
def test_a_wait_ends_with_all_of_the_tile(sm, bits, vectors):
    for seed in range(8):
        source, emulator = tile(bits, vectors, seed), Emulator(sm, seed=seed)
        out, error = awaited(source, emulator)
        assert torch.equal(out, canonical(source)) and not error
        assert emulator.faults == []


@CASES
@pytest.mark.parametrize("limit", [LIMIT, -LIMIT])
def test_a_tile_that_had_arrived_meets_no_deadline(sm, bits, vectors, limit):
    source = canonical(tile(bits, vectors)).view(DTYPES[bits])
    out, error = awaited(source, Emulator(sm, missing=0), y=source.clone(), limit=limit)
    assert torch.equal(out, canonical(source)) and not error


@CASES
@pytest.mark.parametrize("never", [1, 3])
def test_a_wait_for_what_never_arrives_sets_the_flag(sm, bits, vectors, never):
    source = tile(bits, vectors)
    out, error = awaited(source, Emulator(sm), never=never)
    assert error == 1
    assert (out[:never] == -1).all() and torch.equal(out[never:], canonical(source)[never:])
