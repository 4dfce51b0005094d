"""Faults planted in the kernels: the emulator, or the comparison with float64, must find each.

Most are changes of the PTX, by regular expressions; some of the library's source, in a copy of it.
One that changes nothing, or that another check finds than the expected one, counts as missed."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from trigru import launch

from .cases import Case, what_is_wrong

ROOT = Path(__file__).parents[2]
LATENCY = Case(90, "bf16", False, 29, 9, 4, 3, "latency")
CHUNKS = Case(90, "bf16", False, 200, 9, 4, 3, "latency")
OLD = Case(80, "bf16", False, 29, 9, 4, 3, "latency")
TF32 = Case(90, "tf32", False, 29, 5, 4, 3, "latency")
EXACT = Case(80, "ieee", False, 29, 5, 4, 3, "latency")
MANY = Case(90, "bf16", False, 140, 9, 4, 3, "latency16")  # vectors a wait
SOLO = Case(90, "bf16", False, 22, 17, 4, 3, "solo")
SOLO_WGMMA = Case(90, "bf16", False, 60, 17, 4, 3, "solo wgmma")
STAGED = Case(90, "bf16", False, 140, 17, 4, 3, "throughput")
WGMMA = Case(90, "bf16", False, 140, 17, 4, 3, "throughput wgmma")
KINDS = (LATENCY, OLD, TF32, SOLO, SOLO_WGMMA, STAGED, WGMMA)
PACKED = Case(90, "bf16", False, 29, 9, 5, 3, "latency", lengths=(5, 4, 4) + (2,) * 6)
RESETS = replace(LATENCY, resets="learned")
SCALED = replace(LATENCY, scaled=True)
CLIPPED = replace(SOLO, clip=0.3)
FAR = Case(90, "bf16", False, 29, 5, 3, 3, "latency", far=10**8)


def nan(case: Case) -> Case:
    """One sequence begins with the sentinel's bits."""
    return replace(case, B=5, poison="nan", where="h0")


def inf(case: Case) -> Case:
    return replace(case, B=5, poison="inf", where="h0")


def held(case: Case) -> Case:
    """An infinity in one sequence's state, for ever, and other numbers beside it."""
    return replace(inf(case), poison="held")


MAX_INSTRUCTIONS = 10**6  # a mutant may never end

Mutate = Callable[[str], str]


@dataclass(frozen=True)
class Mutant:
    name: str
    case: Case
    mutate: Mutate  # of the PTX
    expected: str  # a regular expression for what is found


@dataclass(frozen=True)
class SourceMutant:
    name: str
    case: Case
    file: str  # of trigru/
    old: str  # which occurs in it
    new: str
    expected: str


def sub(pattern: str, to: str, count: int = 0, skip: int = 0) -> Mutate:
    """Replace `count` matches (0: all) of the pattern, after the first `skip`."""

    def mutate(ptx: str) -> str:
        seen = 0

        def one(match: re.Match) -> str:
            nonlocal seen
            seen += 1
            chosen = seen > skip and (not count or seen <= skip + count)
            return match.expand(to) if chosen else match[0]

        return re.sub(pattern, one, ptx)

    return mutate


def _halve_strides(ptx: str) -> str:
    """Of wgmma's descriptors with a swizzle of 128 bytes, which all begin with these digits."""
    return re.sub(r"-?\b4611686\d+", lambda match: str(int(match[0]) - (32 << 32)), ptx)


BARRIER = r"\tbar\.sync \t0;"
LEAVES = "mov.u32 %r1, %tid.x; setp.eq.u32 %p1, %r1, 7; @%p1 ret; bar.sync 0;"
AROUND = "mov.u32 %r1, %warpid; setp.eq.u32 %p1, %r1, 1; @%p1 bra SKIP; bar.sync 0; SKIP:"
NUMBERS = "relative error"
NANS = "NaN than in float64"
STRAY = f"racecheck|memcheck|initcheck|stored twice|never written|{NUMBERS}"
FOREVER = "no progress|too many instructions"
PTX = [
    # The exchange's protocol
    Mutant(
        "canonical NaN: none, of 16 bits",
        nan(LATENCY),
        sub(r"min\.u16 v, (\S+), 0xFFFE;", r"mov.b16 v, \1;"),
        "sentinel is stored",
    ),
    Mutant(
        "canonical NaN: none, of the first of a pair",
        nan(STAGED),
        sub(r"min\.u16 a, a, 0xFFFE;", ""),
        "sentinel is stored",
    ),
    Mutant(
        "canonical NaN: none, of the second of a pair",
        nan(STAGED),
        sub(r"min\.u16 b, b, 0xFFFE;", ""),
        "sentinel is stored",
    ),
    Mutant(
        "canonical NaN: none, of 32 bits",
        nan(TF32),
        sub(r"min\.u32 v, (\S+), 0xFFFFFFFE;", r"mov.b32 v, \1;"),
        "sentinel is stored",
    ),
    Mutant(
        "publish: rows that are not there",
        LATENCY,
        sub(r"@p st\.relaxed\.gpu", "st.relaxed.gpu"),
        "out of bounds|two threads|stored twice",
    ),
    Mutant(
        "publish: one of a pair",
        STAGED,
        sub(r"st\.relaxed\.gpu\.global\.b32 (\S+), v", r"st.relaxed.gpu.global.b16 \1, a"),
        FOREVER,
    ),
    Mutant(
        "wait: loads are plain",
        LATENCY,
        sub(r"ld\.relaxed\.gpu\.global", "ld.global"),
        "no progress|weak load",
    ),
    Mutant("wait: leaves at once", LATENCY, sub(r"@p bra DONE;", "bra DONE;"), NUMBERS),
    Mutant("wait: leaves at once, of stages", STAGED, sub(r"@p bra DONE;", "bra DONE;"), NUMBERS),
    Mutant("wait: what was begun is not looked at", STAGED, sub("bra TEST;", "bra DONE;"), NUMBERS),
    Mutant("wait: gives up at once", LATENCY, sub("@p bra NEVER;", "bra NEVER;"), "gave up"),
    Mutant(
        "wait: gives up in silence",
        replace(LATENCY, B=5, missing=True),
        sub(r"st\.relaxed\.sys\.global[^;]*;", ""),
        "no ExchangeTimeout",
    ),
    Mutant("wait: looks at upper halves only", CHUNKS, sub("0x80008000", "0x80000000"), NUMBERS),
    Mutant("wait: looks at lower halves only", CHUNKS, sub("0x80008000", "0x00008000"), NUMBERS),
    Mutant(
        "wait: looks at two words of four",
        CHUNKS,
        sub(r"max\.u16x2 b, [^;]*;", "mov.b32 b, 0;"),
        NUMBERS,
    ),
    Mutant(
        "wait: looks at one word, sm_80",
        replace(CHUNKS, sm=80),
        sub(r"lop3\.b32 a, b,[^;]*;", ""),
        NUMBERS,
    ),
    Mutant(
        "wait: looks at two words, float32",
        replace(TF32, H=100, B=9),
        sub(r"max\.u32 a, a, [^;]*;", ""),
        NUMBERS,
    ),
    Mutant("wait: an endless loop", LATENCY, sub(r"@p bra DONE;", "bra TRY;", 1), FOREVER),
    # Barriers and fences
    Mutant("barriers: none", LATENCY, sub(BARRIER, ""), "racecheck"),
    Mutant("barriers: none, solo", SOLO, sub(BARRIER, ""), "racecheck"),
    Mutant("barriers: none, stages", STAGED, sub(BARRIER, ""), "racecheck"),
    Mutant("barriers: none, wgmma", WGMMA, sub(BARRIER, ""), "racecheck"),
    Mutant(
        "barriers: a thread leaves before one", LATENCY, sub(BARRIER, LEAVES, 1, 1), "synccheck"
    ),
    Mutant(
        "barriers: a branch around one",
        LATENCY,
        sub(BARRIER, AROUND, 1, 1),
        "synccheck|racecheck|deadlock",
    ),
    *(
        Mutant(f"fences: {name}, {case.form}", case, mutate, expected)
        for case in (SOLO_WGMMA, WGMMA)
        for name, mutate, expected in (
            ("no proxy fence", sub(r"fence\.proxy\.async[^;]*;", ""), "no fence.proxy.async"),
            ("no wgmma.fence", sub(r"wgmma\.fence[^;]*;", ""), "no wgmma.fence"),
            ("no wgmma.wait_group", sub(r"\twgmma\.wait_group[^;]*;", ""), "under way"),
            (
                "two wgmma groups are left under way",
                sub(r"(wgmma\.wait_group\S*\s+)0;", r"\g<1>2;"),
                "under way",
            ),
        )
    ),
    # Layouts
    Mutant(
        "layouts: registers of A swapped",
        LATENCY,
        sub(r"(mma\.sync.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        NUMBERS,
    ),
    Mutant(
        "layouts: registers of B swapped",
        LATENCY,
        sub(r"(mma\.sync.*?\}, \{.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        NUMBERS,
    ),
    Mutant(
        "layouts: B not transposed, wgmma",
        SOLO_WGMMA,
        sub(r"(wgmma\.mma_async.*, 1, 1, 0), 1;", r"\1, 0;"),
        STRAY,
    ),
    Mutant(
        "layouts: B transposed, wgmma",
        WGMMA,
        sub(r"(wgmma\.mma_async.*, 1, 1, 0), 0;", r"\1, 1;"),
        STRAY,
    ),
    Mutant("layouts: wgmma's stride halved", WGMMA, _halve_strides, f"{STRAY}|aligned"),
    Mutant(
        "layouts: ldmatrix transposed",
        STAGED,
        sub(r"(ldmatrix\.sync\.aligned\.m8n8\.x[24])\.shared", r"\1.trans.shared"),
        NUMBERS,
    ),
    Mutant(
        "layouts: ldmatrix not transposed", SOLO, sub(r"(ldmatrix\.\S*)\.trans", r"\1"), NUMBERS
    ),
    *(
        Mutant(
            f"layouts: stmatrix transposed, {case.form}",
            case,
            sub(r"(stmatrix\.sync\.aligned\.m8n8\.x[24])\.shared", r"\1.trans.shared"),
            NUMBERS,
        )
        for case in (SOLO, SOLO_WGMMA)
    ),
    Mutant(
        "layouts: halves of a word swapped when it is packed",
        SOLO,
        sub(r"(cvt\.rn\.bf16x2\.f32 \t%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;"),
        NUMBERS,
    ),
    Mutant(
        "layouts: halves of a word swapped when it is unpacked",
        SOLO,
        sub(
            r"shl\.b32 (%r\d+), (%r\d+), 16; and\.b32 (%r\d+),", r"shl.b32 \3, \2, 16; and.b32 \1,"
        ),
        NUMBERS,
    ),
    Mutant(
        "layouts: a shared store elsewhere",
        LATENCY,
        sub(r"(st\.shared\S* \t\[%r\d+)\]", r"\1+64]", 1),
        STRAY,
    ),
    Mutant(
        "layouts: a stage stored elsewhere",
        STAGED,
        sub(r"(st\.shared\.v4\S* \t\[%r\d+)\+(\d+)\]", r"\1+16+\2]", 1, 14),
        STRAY,
    ),
    # Masks, bounds, alignment
    Mutant(
        "bounds: a global load too far",
        LATENCY,
        sub(r"(ld\.global\.\S+ [^\[]*\[ %rd\d+) \+ 0", r"\1 + 1048576"),
        "out of bounds",
    ),
    Mutant(
        "bounds: a shared store too far",
        LATENCY,
        sub(r"(st\.shared\S+ \t\[%r\d+)[^\]]*\]", r"\1+232448]", 1),
        "shared access out of bounds",
    ),
    Mutant(
        "bounds: stores at odd addresses",
        LATENCY,
        sub(r"(st\.global\.\S+ \[ %rd\d+) \+ 0", r"\1 + 1"),
        "misaligned",
    ),
    Mutant(
        "masks: stores are not masked",
        LATENCY,
        sub(r"@%p\d+ (st\.global)", r"\1"),
        "out of bounds|two threads|stored twice",
    ),
    Mutant(
        "masks: loads are not masked",
        LATENCY,
        sub(r"@%p\d+ (ld\.global)", r"\1"),
        "out of bounds|initcheck|weak load",
    ),
    # Arithmetic
    Mutant(
        "numbers: TF32 operands are cut off",
        TF32,
        sub(r"cvt\.rna\.tf32\.f32 (\S+), (\S+);", r"mov.b32 \1, \2;"),
        NUMBERS,
    ),
    Mutant(
        "numbers: an exponential of the other sign",
        LATENCY,
        sub(r"(ex2\.approx\S* %r\d+, )(%r\d+);", r"neg.f32 \2, \2;\n\t\g<1>\2;", 1),
        NUMBERS,
    ),
    Mutant(
        "numbers: a sum forgets a part",
        LATENCY,
        sub(r"add\.f32 \t(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;", 1),
        NUMBERS,
    ),
]

PUBLISH = "                        publish(y, h, mask, FORM)\n"
SETTLE = "arrived = settle(begun[0], ptrs, limit, error_ptr, c + 1, FORM)"
WAIT_WGMMA = "            if c > 0:\n                sums = wgmma_wait(sums)\n"
CORRECTIONS = [
    '        acc = mma_v2(remainder(a, a_high), finite(b_high), acc, input_precision="tf32")\n',
    '        acc = mma_v2(finite(a_high), remainder(b, b_high), acc, input_precision="tf32")\n',
]
MASK = "mask = mask_h[:, None] & (n_row < {})[None, :]"
SOURCE = [
    # Masks
    SourceMutant(
        "units' mask off by one",
        LATENCY,
        "forward.py",
        "mask_h = unit < H\n",
        "mask_h = unit <= H\n",
        STRAY,
    ),
    SourceMutant(
        "batch mask off by one",
        LATENCY,
        "forward.py",
        MASK.format("real"),
        MASK.format("real + 1"),
        "memcheck|racecheck|stored twice",
    ),
    SourceMutant(
        "running rows off by one",
        PACKED,
        "backward.py",
        MASK.format("end"),
        MASK.format("end + 1"),
        "memcheck|racecheck|stored twice",
    ),
    SourceMutant(
        "packed: rows that do not run overwrite the state",
        PACKED,
        "forward.py",
        "h = gl.where(mask, h, h_before)",
        "h = h",
        NUMBERS,
    ),
    SourceMutant(
        "packed: rows that do not run overwrite the gradient",
        PACKED,
        "backward.py",
        "dh = gl.where(mask, dh, dh_later)",
        "dh = dh",
        NUMBERS,
    ),
    SourceMutant(
        "packed: rows that join are awaited where they have not been",
        replace(PACKED, reverse=True),
        "forward.py",
        "gl.where(at < running_before, before, N + row0) + at",
        "before + at",
        f"{FOREVER}|{STRAY}",
    ),
    SourceMutant(
        "an awaited tile is not cut at its last row",
        replace(LATENCY, B=8),
        "tiles.py",
        "return gl.minimum(n, last)",
        "return n",
        f"{FOREVER}|{STRAY}",
    ),
    # Which row, which tile, which step
    SourceMutant(
        "gates swapped",
        LATENCY,
        "products.py",
        "load_u(u_ptr + SQUARE",
        "load_u(u_ptr + 2 * SQUARE",
        NUMBERS,
    ),
    SourceMutant(
        "each batch tile's h0 in the same rows",
        LATENCY,
        "forward.py",
        "before = N + row0 ",
        "before = N ",
        "two threads store",
    ),
    SourceMutant(
        "a state published twice", LATENCY, "forward.py", PUBLISH, 2 * PUBLISH, "stored twice"
    ),
    SourceMutant(
        "row numbers of 32 bits",
        replace(FAR, far=3 * 10**8),
        "tiles.py",
        "    return first + row0, ",
        "    return (first + row0).to(gl.int32).to(gl.int64), ",
        "memcheck",
    ),
    SourceMutant(
        "the state of two steps ago",
        replace(LATENCY, B=5),
        "forward.py",
        "before = row\n",
        "before = gl.where(i + half > 0, row - step * B, row)\n",
        NUMBERS,
    ),
    SourceMutant(
        "the state of two steps ago, solo",
        SOLO,
        "forward.py",
        "state = (states[half],)",
        "state = (states[1 - half],)",
        STRAY,
    ),
    SourceMutant(
        "the gradients of the step before",
        replace(LATENCY, B=5),
        "backward.py",
        "source = row_dgh + awaited_now",
        "source = row_dgh - gl.where(i > 0, step * B, 0) * (D * 3 * H_ROW) + awaited_now",
        NUMBERS,
    ),
    SourceMutant(
        "the input of another step",
        SOLO,
        "forward.py",
        "else load_row + step * B",
        "else row + step * B",
        NUMBERS,
    ),
    SourceMutant(
        "what has not arrived is not loaded again",
        MANY,
        "exchange.py",
        'f"@!p {load}"',
        'f"@p {load}"',
        FOREVER,
    ),
    # Chunks and stages
    SourceMutant(
        "a chunk is not awaited",
        STAGED,
        "products.py",
        f"{SETTLE}\n            begun = begun[1:]\n    return sums\n",
        "arrived = begun[0]\n            begun = begun[1:]\n    return sums\n",
        NUMBERS,
    ),
    SourceMutant(
        "a chunk is not awaited, wgmma", WGMMA, "products.py", SETTLE, "arrived = begun[0]", NUMBERS
    ),
    SourceMutant(
        "a chunk's product is not added",
        CHUNKS,
        "products.py",
        "sums[g] + multiply(u, tile, nil, FORM)",
        "multiply(u, tile, nil, FORM)",
        NUMBERS,
    ),
    SourceMutant(
        "a chunk twice",
        STAGED,
        "exchange.py",
        "offset = (first + t) * form.TILE_STRIDE",
        "offset = min(first + t, 1) * form.TILE_STRIDE",
        NUMBERS,
    ),
    SourceMutant(
        "one part of a split sum",
        CHUNKS,
        "tiles.py",
        "part[:, None, None] * FORM.K + k[None, :, None]",
        "0 * part[:, None, None] + k[None, :, None]",
        NUMBERS,
    ),
    SourceMutant(
        "wgmma: a stage is overwritten while it is read",
        replace(WGMMA, H=300),
        "products.py",
        WAIT_WGMMA,
        "",
        "under way|racecheck",
    ),
    SourceMutant(
        "K in the order of memory",
        LATENCY,
        "products.py",
        "tile = fragments_first(tile, FORM)",
        "tile = tile",
        NUMBERS,
    ),
    # Arithmetic
    SourceMutant(
        "the bias of n outside r",
        LATENCY,
        "forward.py",
        "n = tanh(a_n + r * gh_n, FORM)",
        "n = tanh(a_n + r * (gh_n - b_n) + b_n, FORM)",
        NUMBERS,
    ),
    SourceMutant(
        "dh with the wrong part of z",
        LATENCY,
        "backward.py",
        "kept = 1 - z if TEXTBOOK else z",
        "kept = 1 - z",
        NUMBERS,
    ),
    *(
        SourceMutant(
            f"exact float32: no correction of {name}", EXACT, "products.py", text, "", NUMBERS
        )
        for name, text in zip(("U", "the state"), CORRECTIONS, strict=True)
    ),
    SourceMutant(
        "exact float32: an infinity multiplied twice",
        inf(EXACT),
        "products.py",
        "mma_v2(remainder(a, a_high), finite(b_high)",
        "mma_v2(remainder(a, a_high), b_high",
        NANS,
    ),
    SourceMutant(
        "solo's padding meets an infinite state",
        held(replace(SOLO, H=21)),
        "form.py",
        "self.H % self.BLOCK_H > 0 and (self.SOLO or self.ODD)",
        "False",
        NANS,
    ),
    SourceMutant(
        "σ is no 0 at −∞",
        inf(replace(SOLO, H=21)),
        "tiles.py",
        " max.NaN.f32 $0, $0, 0f00000000;",
        "",
        NANS,
    ),
    SourceMutant(
        "σ's reciprocal of an infinity",
        inf(replace(SOLO, H=21)),
        "tiles.py",
        "min.NaN.f32 $0, $1, 0f42700000;",
        "mov.b32 $0, $1;",
        NANS,
    ),
    SourceMutant(
        "an infinite state less itself",
        held(replace(SOLO, H=21, textbook=True)),
        "forward.py",
        "h = (1 - z) * h + z * n",
        "h = h + z * (n - h)",
        NANS,
    ),
    SourceMutant(
        "the reset of the step before",
        RESETS,
        "tiles.py",
        "step = 32 * gl.program_id(0) + bit - (1 if AGAINST else 0)",
        "step = 32 * gl.program_id(0) + bit - (2 if AGAINST else 1)",
        NUMBERS,
    ),
    SourceMutant(
        "backward, the reset of the next step",
        RESETS,
        "tiles.py",
        "bit - (1 if AGAINST else 0)",
        "bit",
        NUMBERS,
    ),
    SourceMutant(
        "resets of a later word are those of the one before",
        replace(RESETS, T=40),
        "tiles.py",
        "gl.load(words_ptr + B + rows)",
        "gl.load(words_ptr + rows)",
        NUMBERS,
    ),
    SourceMutant(
        "a program resets its own state, and awaits the old one",
        RESETS,
        "forward.py",
        "is_reset = is_set(bits_in, half)",
        "is_reset = is_set(bits_in & 0, half)",
        NUMBERS,
    ),
    SourceMutant(
        "a program awaits the reset state, and keeps its own",
        RESETS,
        "forward.py",
        "entering = gl.where(is_set(bits, half)[None, :], reset_state, h)",
        "entering = h",
        NUMBERS,
    ),
    SourceMutant(
        "the reset state is not published",
        RESETS,
        "forward.py",
        "publish(ptrs, gl.where(mask, reset_state, 0.0), mask, FORM)",
        "publish(ptrs, gl.where(mask, reset_state, 0.0), mask & (n_row[None, :] > 99), FORM)",
        FOREVER,
    ),
    SourceMutant(
        "a NaN that was reset is in the reset state",
        replace(nan(LATENCY), resets="zero"),
        "forward.py",
        "gl.where(mask, reset_state, 0.0)",
        "reset_state + 0 * h",
        NANS,
    ),
    SourceMutant(
        "a gradient crosses a reset",
        RESETS,
        "backward.py",
        "dh = gl.where(is_reset, 0.0, dh)",
        "dh = dh",
        NUMBERS,
    ),
    SourceMutant(
        "the reset state's gradient is of its last reset alone",
        RESETS,
        "backward.py",
        "dreset += gl.where(is_reset, dh, 0.0)",
        "dreset = gl.where(is_reset, dh, dreset)",
        NUMBERS,
    ),
    SourceMutant(
        "backward, z's slope is not scaled",
        SCALED,
        "backward.py",
        "slope *= scale",
        "slope *= 1.0",
        NUMBERS,
    ),
    SourceMutant(
        "forward, the kept share is not 1 less the candidate's",
        SCALED,
        "forward.py",
        "h = (1 - share) * h + share * n",
        "h = z * h + share * n",
        NUMBERS,
    ),
    SourceMutant(
        "the clip has one side",
        CLIPPED,
        "forward.py",
        "gl.where(h > 0, clip, -clip)",
        "gl.where(h > 0, clip, h)",
        "states up to",
    ),
    SourceMutant(
        "a gradient passes the lower clip",
        CLIPPED,
        "backward.py",
        "(after >= clip) | (after <= -clip)",
        "after >= clip",
        NUMBERS,
    ),
    SourceMutant(
        "heads by turns in both directions",
        replace(RESETS, D=4, heads=2),
        "tiles.py",
        "d // HEADS % 2 == 0",
        "d % 2 == 0",
        NUMBERS,
    ),
]

DID_NOT_APPLY = "the mutation did not apply"


def found_in(mutant: Mutant) -> list[str]:
    """What is wrong with the mutant."""
    applied = False

    def once(ptx: str) -> str:
        nonlocal applied
        changed = mutant.mutate(ptx)
        applied |= changed != ptx
        return changed

    try:
        wrong, _ = what_is_wrong(mutant.case, once, MAX_INSTRUCTIONS)
    except (launch.ExchangeTimeout, ValueError) as error:
        wrong = [str(error)]
    launch.error_flag(torch.device("cpu")).zero_()
    return wrong if applied else [DID_NOT_APPLY]


def found_in_source(mutant: SourceMutant) -> list[str]:
    """The same, of a copy of the library in another process."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("trigru", "tests", "perf"):
            shutil.copytree(ROOT / name, copy / name)
        path = copy / "trigru" / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            return [DID_NOT_APPLY]
        path.write_text(text.replace(mutant.old, mutant.new, 1))
        code = (
            "from emulator.cases import *; import torch; torch.set_num_threads(1);"
            f"print(*what_is_wrong({mutant.case!r}, None, {MAX_INSTRUCTIONS})[0], sep='\\n')"
        )
        environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'tests'}"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, text=True
        )
        return [line for line in (done.stdout + done.stderr[-600:]).splitlines() if line]


def is_caught(mutant: Mutant | SourceMutant) -> tuple[bool, str]:
    """Whether the right check finds it, and the first line of that, or of what is found instead."""
    wrong = found_in(mutant) if isinstance(mutant, Mutant) else found_in_source(mutant)
    hits = [line for line in wrong if re.search(mutant.expected, line)]
    return bool(hits), (hits or wrong or ["nothing is found"])[0]


def run(words: list[str]) -> bool:
    """A line for each mutant whose name has all these words. Whether all are caught."""
    chosen = [m for m in (*PTX, *SOURCE) if all(word in m.name for word in words)]
    caught = 0
    for mutant in chosen:
        good, line = is_caught(mutant)
        caught += good
        print(f"{'caught' if good else 'MISSED'} {mutant.name}: {line[:150]}", flush=True)
    print(f"{caught} of {len(chosen)} mutants caught")
    return caught == len(chosen)


def barriers() -> bool:
    """Each barrier of some kernels removed in turn: nothing may be found, if it is not needed, but
    a person should have looked at it."""
    # Tiles in turn and a last, odd step: all that there is between two barriers.
    inputs = {"B": 20, "T": 5, "batch_programs": 1}
    for case in (replace(c, textbook=t, **inputs) for c in KINDS for t in (False, True)):
        kernels: list[str] = []
        what_is_wrong(case, lambda ptx, kernels=kernels: kernels.append(ptx) or ptx)
        for ptx in kernels:
            places = [m.start() for m in re.finditer(BARRIER, ptx)]
            cuts = [partial(_only, ptx, sub(BARRIER, "", 1, k)) for k in range(len(places))]
            quiet = [
                ptx[:at].count("\n") + 1
                for at, cut in zip(places, cuts, strict=True)
                if not found_in(Mutant("", case, cut, ""))
            ]
            name = re.search(r"\.entry (\w+)", ptx)[1]  # type: ignore[index]
            print(f"{case} {name}: of {len(places)} barriers {len(quiet)} go unmissed: {quiet}")
    return True


def _only(which: str, mutate: Mutate, ptx: str) -> str:
    return mutate(ptx) if ptx == which else ptx
