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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from trigru import launch

from .cases import Case, what_is_wrong

ROOT = Path(__file__).parents[2]
GROUP = Case(90, "bf16", False, 29, 17, 4, 3, "group")
SCHEDULES = Case(90, "bf16", False, 200, 17, 4, 3)  # with stores of single halves
OLD_GROUP = Case(80, "bf16", False, 29, 17, 4, 3, "group")
TF32_GROUP = Case(90, "tf32", False, 29, 5, 4, 3, "group")
SOLO = Case(90, "bf16", False, 21, 17, 4, 3, "solo")
WGMMA = Case(90, "bf16", False, 64, 17, 4, 3, "solo")
WGMMA_TF32 = Case(90, "tf32", False, 64, 5, 4, 3, "solo")
NAN = Case(90, "bf16", False, 29, 5, 4, 3, "group", poison="nan", where="h0")
NAN_TF32 = Case(90, "tf32", False, 29, 5, 4, 3, "group", poison="nan", where="h0")
PACKED = Case(90, "bf16", False, 29, 20, 5, 3, "group", lengths=(5, 4, 4) + (2,) * 17)
FAR = Case(90, "bf16", False, 29, 5, 3, 3, "group", far=10**8)
MAX_INSTRUCTIONS = 5 * 10**6  # a mutant may never end

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
STRAY = f"racecheck|memcheck|initcheck|stored twice|never written|{NUMBERS}"
PTX = [
    # The exchange's protocol
    Mutant(
        "canonical NaN: none",
        NAN,
        sub(r"min\.u16(x2)? (\s*\S+), (\s*\S+), [^;]+;", r"mov.b32 \2, \3;"),
        "sentinel is stored",
    ),
    Mutant(
        "canonical NaN: none, float32",
        NAN_TF32,
        sub(r"min\.u32 (\s*\S+), (\s*\S+), -2;", r"mov.b32 \1, \2;"),
        "sentinel is stored",
    ),
    Mutant(
        "wait: polls are plain loads",
        GROUP,
        sub(r"ld\.relaxed\.gpu\.global", "ld.global"),
        "no progress|weak load",
    ),
    Mutant(
        "wait: all loads are plain",
        GROUP,
        sub(r"ld\.(relaxed\.gpu|volatile)\.global", "ld.global"),
        "no progress|weak load",
    ),
    Mutant("wait: leaves at once", GROUP, sub(r"@!?\w+ bra DONE;", "bra DONE;"), NUMBERS),
    Mutant("wait: gives up at once", GROUP, sub(r"@\w+ bra TRY;", ""), "gave up"),
    Mutant(
        "wait: looks at upper halves only",
        SCHEDULES,
        sub(r"0x80008000", "0x80000000"),
        f"{NUMBERS}|other bits",
    ),
    Mutant(
        "wait: looks at no word but the first", GROUP, sub(r"lop3\.b32 a, t, [^;]*;", ""), NUMBERS
    ),
    Mutant(
        "wait: an endless loop",
        GROUP,
        sub(r"@!?\w+ bra DONE;", "bra TRY;", 1),
        "no progress|too many instructions",
    ),
    # Barriers and fences
    Mutant("barriers: none", GROUP, sub(BARRIER, ""), "racecheck"),
    Mutant("barriers: none, solo", SOLO, sub(BARRIER, ""), "racecheck"),
    Mutant("barriers: a thread leaves before one", GROUP, sub(BARRIER, LEAVES, 1, 3), "synccheck"),
    Mutant(
        "barriers: a branch around one",
        GROUP,
        sub(BARRIER, AROUND, 1, 3),
        "synccheck|racecheck|deadlock",
    ),
    Mutant(
        "fences: no proxy fence",
        WGMMA,
        sub(r"fence\.proxy\.async[^;]*;", ""),
        "no fence.proxy.async",
    ),
    Mutant("fences: no wgmma.fence", WGMMA, sub(r"wgmma\.fence[^;]*;", ""), "no wgmma.fence"),
    Mutant(
        "fences: no wgmma.wait_group", WGMMA, sub(r"\twgmma\.wait_group[^;]*;", ""), "under way"
    ),
    Mutant(
        "fences: one wgmma group is left under way",
        WGMMA,
        sub(r"(wgmma\.wait_group\S*\s+)0;", r"\g<1>1;"),
        "under way",
    ),
    # Layouts
    Mutant(
        "layouts: registers of A swapped",
        GROUP,
        sub(r"(mma\.sync.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        NUMBERS,
    ),
    Mutant(
        "layouts: registers of B swapped",
        GROUP,
        sub(r"(mma\.sync.*?\}, \{.*?\}, \{ )(%r\d+), (%r\d+)", r"\1\3, \2"),
        NUMBERS,
    ),
    Mutant(
        "layouts: registers of A swapped, wgmma",
        WGMMA_TF32,
        sub(r"(wgmma\.mma_async[^}]*\}, \{)(%r\d+),(%r\d+)", r"\1\3,\2"),
        NUMBERS,
    ),
    Mutant(
        "layouts: B not transposed, wgmma",
        WGMMA,
        sub(r"(wgmma\.mma_async.*, 1, 1, 0), 1;", r"\1, 0;"),
        STRAY,
    ),
    Mutant("layouts: wgmma's stride halved", WGMMA, _halve_strides, f"{STRAY}|aligned"),
    Mutant(
        "layouts: ldmatrix transposed",
        OLD_GROUP,
        sub(r"(ldmatrix\.sync\.aligned\.m8n8\.x[24])\.shared", r"\1.trans.shared"),
        NUMBERS,
    ),
    Mutant(
        "layouts: ldmatrix not transposed", GROUP, sub(r"(ldmatrix\.\S*)\.trans", r"\1"), NUMBERS
    ),
    Mutant(
        "layouts: stmatrix not transposed", WGMMA, sub(r"(stmatrix\.\S*)\.trans", r"\1"), NUMBERS
    ),
    Mutant(
        "layouts: halves of a word swapped",
        SOLO,
        sub(r"(cvt\.rn\.bf16x2\.f32 \t%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \2;"),
        NUMBERS,
    ),
    Mutant(
        "layouts: a shared store elsewhere",
        GROUP,
        sub(r"(st\.shared\S* \t\[%r\d+)\]", r"\1+64]", 1),
        STRAY,
    ),
    # Masks, bounds, alignment
    Mutant(
        "bounds: a global load too far",
        GROUP,
        sub(r"(ld\.global\.\S+ [^\[]*\[ %rd\d+) \+ 0", r"\1 + 1048576"),
        "out of bounds",
    ),
    Mutant(
        "bounds: a shared store too far",
        GROUP,
        sub(r"(st\.shared\S+ \t\[%r\d+)[^\]]*\]", r"\1+232448]", 1),
        "shared access out of bounds",
    ),
    Mutant(
        "bounds: stores at odd addresses",
        GROUP,
        sub(r"(st\.global\.\S+ \[ %rd\d+) \+ 0", r"\1 + 1"),
        "misaligned",
    ),
    Mutant(
        "masks: stores are not masked",
        GROUP,
        sub(r"@%p\d+ (st\.global)", r"\1"),
        "out of bounds|two threads|stored twice",
    ),
    Mutant(
        "masks: loads are not masked",
        GROUP,
        sub(r"@%p\d+ (ld\.global)", r"\1"),
        "out of bounds|initcheck|weak load",
    ),
    # Arithmetic
    Mutant(
        "numbers: TF32 operands are cut off",
        TF32_GROUP,
        sub(r"cvt\.rna\.tf32\.f32 (\S+), (\S+);", r"mov.b32 \1, \2;"),
        NUMBERS,
    ),
    Mutant(
        "numbers: an exponential of the other sign",
        GROUP,
        sub(r"(ex2\.approx\S* \t%r\d+, )(%r\d+);", r"neg.f32 \2, \2;\n\t\g<1>\2;", 1),
        NUMBERS,
    ),
    Mutant(
        "numbers: a sum forgets a part",
        GROUP,
        sub(r"add\.f32 \t(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;", 1),
        NUMBERS,
    ),
]

TWICE = """            publish(y_ptr + row * H_ROW + own, h_next, mask_row)
            if SAVE:
"""
SOURCE = [
    SourceMutant(
        "units' mask off by one",
        GROUP,
        "forward.py",
        "mask_h = offs_h < H\n",
        "mask_h = offs_h <= H\n",
        STRAY,
    ),
    SourceMutant(
        "batch mask off by one",
        GROUP,
        "forward.py",
        "in_batch = offs_b < (B",
        "in_batch = offs_b <= (B",
        "memcheck|racecheck|stored twice",
    ),
    SourceMutant(
        "running rows off by one",
        PACKED,
        "backward.py",
        "(offs_b < running)[None, :]\n            mask_row",
        "(offs_b <= running)[None, :]\n            mask_row",
        "memcheck|racecheck|stored twice",
    ),
    SourceMutant(
        "gates swapped",
        GROUP,
        "forward.py",
        "u_z = load_u(u_ptr + H_PAD",
        "u_z = load_u(u_ptr + 2 * H_PAD",
        NUMBERS,
    ),
    SourceMutant(
        "the padding is not published",
        GROUP,
        "forward.py",
        "own, h_next, mask_row)",
        "own, h_next, mask)",
        "no progress",
    ),
    SourceMutant(
        "no canonical NaN",
        NAN,
        "exchange.py",
        "tl.where(bits == -1, bits & ~1, bits)",
        "bits",
        "sentinel is stored",
    ),
    SourceMutant(
        "the bias of n outside r",
        GROUP,
        "forward.py",
        "n = tanh(a_n + r * gh_n)",
        "n = tanh(a_n + r * (gh_n - b_n) + b_n)",
        NUMBERS,
    ),
    SourceMutant(
        "dh with the wrong part of z",
        GROUP,
        "backward.py",
        "dh = dh * z\n",
        "dh = dh * (1 - z)\n",
        NUMBERS,
    ),
    SourceMutant(
        "a state published twice",
        GROUP,
        "forward.py",
        "            if SAVE:\n",
        TWICE,
        "stored twice",
    ),
    SourceMutant(
        "row numbers of 32 bits",
        FAR,
        "tiles.py",
        "    return first + row0, ",
        "    return (first + row0).to(tl.int32).to(tl.int64), ",
        "memcheck",
    ),
    SourceMutant(
        "a chunk is not awaited",
        GROUP,
        "forward.py",
        "state = settle(ahead, chunk, mask_operand, deadline, error_ptr, SPIN)",
        "state = ahead",
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
        for name in ("trigru", "tests"):
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
    for case in (GROUP, OLD_GROUP, SOLO, WGMMA, TF32_GROUP):
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
