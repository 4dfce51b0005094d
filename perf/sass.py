"""What one time step of a compiled kernel costs, from its machine code: a MODEL, nothing measured.

    estimate(cubin, num_warps=8, publish_lines=publish_lines(exchange)).clocks

The kernel's time loop is issued in order for all warps of one program on four schedulers, one
instruction a clock each, with what the compiler itself wrote into every instruction: how long to
stall, which of six scoreboards to set and to wait for. Latencies and rates of the units are
`Parameters`; a barrier waits for the last warp; a loop that polls is left only when what it loads
is there: a tile is visible `store_visible` clocks after the last warp's last publishing store. All
programs of a group are taken to behave as this one does, so the loop closes on itself.

It knows no bank conflicts, no misses of the instruction cache, no skew between programs and no
queues in L2, and counts an access to a spilled register as an instruction of arithmetic: a kernel
that spills is estimated too fast. Until a GPU has calibrated the parameters, only differences
between kernels under the same parameters mean anything.

Control words as in Jia et al., arXiv:1804.06826: of the upper 64 bits, 41–44 stall, 46–48 the
scoreboard that is set when the result is there, 49–51 that of the operands having been read, 52–57
those to wait for.
"""

import ast
import math
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path

from .compiling import run_tool

SCHEDULERS = 4  # of an SM; warp w is issued by scheduler w % 4
SCOREBOARDS = 6
PASSES = 8  # of the loop; the first ones are not counted, in which the exchange finds its pace
COUNTED = PASSES - 2  # the pass whose instructions are counted; the last one ends warp by warp
TIMED = 3  # passes up to it, over which the time is taken
MAX_CLOCKS = 3_000_000  # at which clocks something is issued, in all passes
SAMPLES = 5  # the estimate is a mean over as many delays of visibility …
SPREAD = 100.0  # … up to so many clocks off: it takes out where in a poll's period a tile arrives


@dataclass(frozen=True)
class Parameters:
    """What is assumed of an H100, in clocks. "Guess" is one; the rest was published by others, of
    whom HPMLL's and RRZE's (gpu-benches) are microbenchmarks."""

    l2_round_trip: float = 270.0  # a load that hits L2: 265 on H100 (RRZE), 264 on H800 (HPMLL)
    l2_request: float = 0.5  # the part of it after which L2 is read; guess
    l2_jitter: float = 0.15  # of it, uniform; guess. ±20% by SM and slice on L40 (arXiv:2606.22588)
    l2_bytes_per_clock: float = 48.0  # into one SM; 37 with all SMs of an H200 (RRZE), at most 64
    store_visible: float = 300.0  # from a store's issue to L2's showing it; guess, 150 to 450
    weak_load: float = 600.0  # of what no other program writes: from DRAM, a step ahead
    lds: float = 29.0  # HPMLL: 29, by pointer chase 33
    ldmatrix: float = 33.0  # .x4; 29–33 on A100 (arXiv:2206.02874)
    sts_read: float = 12.0  # until a store to shared memory has read its registers; guess
    barrier: float = 22.0  # from the last arrival to all going on; guess, 20 to 30
    mufu: float = 20.0  # 17 on sm_86 (DocumentSASS), 18–23 elsewhere
    mufu_interval: float = 8.0  # 16 lanes a clock and SM (CUDA programming guide)
    hmma: float = 33.0  # m16n8k16 to a dependent one: 33 on sm_86 (DocumentSASS), 25–33 on A100
    hmma_interval: float = 6.4  # 4, at the 62.9% of peak that mma.sync reaches (arXiv:2402.13499)
    wgmma_tile: float = 4.0  # 16 × 8 × 16 of a warp, at peak
    wgmma: float = 60.0  # from the last tile to the wait's end; guess
    shuffle: float = 24.0
    special: float = 24.0  # of instructions whose latency varies: S2R, LDC, conversions …; guess
    timer: float = 40.0  # the global timer's or a clock's register; guess


H100 = Parameters()


@dataclass(frozen=True)
class Phases:
    """One exchange of a pass, in clocks, from one last publishing store to the next one."""

    wait: float  # until the last warp has left the last polling loop
    operand: float  # until the first product after it
    products: float  # until the last result
    reduction: float  # until the last load from shared memory, of parts of sums
    gates: float  # until all is published


@dataclass(frozen=True)
class Estimate:
    """Of one time step, unless it says pass: one pass of the loop may hold several steps."""

    clocks: float  # mean over several delays of visibility
    low: float
    high: float
    barriers: float
    issued: dict[str, float]  # by a warp: how many instructions of each class, "HMMA", "LDS", …
    spills: float  # accesses to spilled registers, LDL and STL, in the loop's code
    phases: list[Phases]  # of each exchange of a pass; none where nothing is exchanged


@dataclass
class Instruction:
    text: str
    predicate: str
    opcode: str  # with its suffixes
    target: str  # the label of a branch
    line: str  # of the source: "exchange.py:46"
    stall: int = 0
    sets: int = 7  # the scoreboard of its result; 6 and 7 are none
    reads: int = 7  # that of its operands
    waits: Sequence[int] = ()
    name: str = field(init=False)  # without suffixes
    unit: str = field(init=False)
    first: str = field(init=False)  # operand, mostly where the result goes
    copies: str = field(init=False)  # the register that it copies to `first`
    strong: bool = field(init=False)  # a load of what another program publishes

    def __post_init__(self) -> None:
        body = self.text.removeprefix(f"@{self.predicate} ").removeprefix(self.opcode)
        self.first = body.split(",")[0].strip()
        self.name = self.opcode.partition(".")[0]
        if self.opcode == "CALL.REL.NOINC":  # so ptxas writes some branches, too
            self.name = "BRA"
        registers = re.findall(r"\bR\d+", body)
        moves = self.name == "MOV" or self.opcode.startswith("IMAD.MOV")
        self.copies = registers[1] if moves and len(registers) == 2 else ""
        self.unit = unit_of(self.name)
        # That of the error flag, which a wait that takes long looks at, is a STRONG.SYS.
        self.strong = self.opcode.startswith(("LDG", "LD.")) and "STRONG.GPU" in self.opcode


@dataclass
class Loop:
    """The time loop: instructions `start` to `end`, of which the last one jumps back."""

    instructions: list[Instruction]
    labels: dict[str, int]
    start: int
    end: int
    polls: list[tuple[int, int]]  # the loops within that wait, each first and last instruction

    def target(self, at: int) -> int | None:
        """Where the branch there goes."""
        return self.labels.get(self.instructions[at].target)

    def span(self) -> range:
        return range(self.start, self.end + 1)


def estimate(
    cubin: bytes | Path,
    *,
    num_warps: int,
    steps_per_pass: int = 1,
    publish_lines: Collection[str] = (),
    rows_frac: float = 1.0,
    params: Parameters = H100,
) -> Estimate:
    """The clocks of one time step of a kernel.

    steps_per_pass: time steps that one pass of the loop holds. publish_lines: the lines of source
    whose stores publish. rows_frac: the part of a tile's rows that is real, the rest being neither
    loaded nor stored. Raises ValueError if the code has no time loop, or one that waits for what
    nothing publishes or as often as its steps cannot."""
    return estimate_listing(
        disassemble(cubin), num_warps=num_warps, steps_per_pass=steps_per_pass,
        publish_lines=publish_lines, rows_frac=rows_frac, params=params,
    )  # fmt: skip


def estimate_listing(
    listing: str,
    *,
    num_warps: int,
    steps_per_pass: int,
    publish_lines: Collection[str],
    rows_frac: float,
    params: Parameters,
) -> Estimate:
    """As `estimate`, from what nvdisasm prints."""
    loop = find_loop(*parse(listing))
    exchanges = find_exchanges(loop, publish_lines)
    if len(exchanges.awaited) % steps_per_pass:
        raise ValueError(f"{len(exchanges.awaited)} waits in a loop of {steps_per_pass} steps")
    runs = []
    for seed in range(SAMPLES):
        visible = params.store_visible + SPREAD * (2 * seed / (SAMPLES - 1) - 1)
        varied = replace(params, store_visible=visible)
        runs.append(Simulation(loop, exchanges, num_warps, rows_frac, varied, seed).run())
    clocks = [run.clocks() / steps_per_pass for run in runs]
    last = runs[-1]
    return Estimate(
        sum(clocks) / SAMPLES, min(clocks), max(clocks),
        barriers=last.barriers / steps_per_pass,
        issued={name: n / num_warps / steps_per_pass for name, n in last.issued.items()},
        spills=spills(loop) / steps_per_pass,
        phases=[mean(alike) for alike in zip(*(run.phases() for run in runs), strict=True)],
    )  # fmt: skip


def mean(alike: Sequence[Phases]) -> Phases:
    names = [f.name for f in fields(Phases)]
    return Phases(*(sum(getattr(p, name) for p in alike) / len(alike) for name in names))


def spills(loop: Loop) -> int:
    """Accesses to spilled registers in the loop's code."""
    return sum(loop.instructions[k].name in ("LDL", "STL") for k in loop.span())


def publish_lines(module_file: Path | str, function: str = "publish") -> set[str]:
    """The lines of a module's function whose stores publish, as machine code names them. All of
    them: the line of an inline PTX is that of its call or of one of its arguments."""
    path = Path(module_file)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return {f"{path.name}:{n}" for n in range(node.lineno, (node.end_lineno or 0) + 1)}
    raise ValueError(f"{path} has no function {function}")


# --- from a cubin to instructions


def disassemble(cubin: bytes | Path) -> str:
    """nvdisasm's listing with encodings and lines of source."""
    if isinstance(cubin, Path):
        return run_tool("nvdisasm", "-c", "-hex", "-gi", str(cubin))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return disassemble(Path(file.name))


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and of each label the number of the one it stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line, current = "", None
    for text in listing.splitlines():
        if match := re.match(r"\s*(\.L_\w+):", text):
            labels[match[1]] = len(instructions)
        elif match := re.search(r'//## File "([^"]*)", line (\d+)', text):
            line = f"{Path(match[1]).name}:{match[2]}"
        elif match := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;\s*/\* 0x\w{16} \*/", text):
            current = instruction(match[1], line)
        elif current and (match := re.match(r"\s*/\* 0x(\w{16}) \*/", text)):
            control(current, int(match[1], 16) >> 41)  # the second half of its encoding
            instructions.append(current)
            current = None
    return instructions, labels


def instruction(text: str, line: str) -> Instruction:
    match = re.match(r"(?:@(!?U?P\w+)\s+)?(\S+)", text)
    assert match
    target = re.search(r"`\((\.L_\w+)\)", text)
    return Instruction(text, match[1] or "", match[2], target[1] if target else "", line)


def control(instruction: Instruction, word: int) -> None:
    """Fill in what the control word says."""
    instruction.stall = word & 15
    instruction.sets, instruction.reads = word >> 5 & 7, word >> 8 & 7
    instruction.waits = [board for board in range(SCOREBOARDS) if word >> 11 + board & 1]


def unit_of(name: str) -> str:
    """The unit that executes an instruction."""
    if name in ("HMMA", "HGMMA", "BAR", "MUFU"):
        return name
    if name in MEMORY:
        return "memory"
    if name in ("FADD", "FMUL", "FFMA", "FFMA2", "HADD2", "HMUL2", "HFMA2"):
        return "float"
    if name.startswith("IMAD"):
        return "multiply"
    return "uniform" if name.startswith("U") else "integer"


QUEUES = ("BAR", "HGMMA")  # what takes an instruction though it is busy
MEMORY = {
    "LD", "LDG", "LDGSTS", "LDS", "LDSM", "ST", "STG", "STS", "STSM", "ATOMG", "ATOMS", "RED",
    "CCTL", "SHFL",
}  # fmt: skip
# Of the integer unit, what it takes at once; the rest, 16 lanes wide, takes two clocks.
BRIEF = ("BRA", "NOP", "WARPSYNC", "YIELD", "BSSY", "BSYNC", "CS2R", "LDC", "S2R", "R2UR")
# What takes `special` clocks, whatever the unit.
SPECIAL = (
    "S2R", "S2UR", "LDC", "ULDC", "R2UR", "F2F", "F2I", "I2F", "POPC", "VOTE", "MATCH",
)  # fmt: skip


def wavefronts(opcode: str) -> int:
    """Clocks for which an access has the SM's load and store unit to itself."""
    if opcode.startswith(("LDSM", "STSM")):
        return 4 if opcode.endswith(".4") else 2 if opcode.endswith(".2") else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


# --- the loop and its exchanges


def find_loop(instructions: list[Instruction], labels: dict[str, int]) -> Loop:
    """The innermost loop with most of the kernel's products. Most, not all: a kernel whose loop
    holds two steps does the last of an odd number in a second loop, which has a third of them."""
    products = [k for k, i in enumerate(instructions) if i.unit in ("HMMA", "HGMMA")]
    loops = [
        (labels[i.target], k)
        for k, i in enumerate(instructions)
        if i.name == "BRA" and labels.get(i.target, k + 1) <= k
    ]

    def held(a: int, b: int) -> int:
        return sum(a <= k <= b for k in products)

    most = [(b - a, a, b) for a, b in loops if held(a, b) >= max(1, 0.6 * len(products))]
    if not most:
        raise ValueError("no loop with most of the kernel's products on tensor cores: no time loop")
    _, start, end = min(most)
    polls = [
        (a, b)
        for a, b in loops
        if start <= a and b <= end and not held(a, b) and any(i.strong for i in instructions[a:b])
    ]
    return Loop(instructions, labels, start, end, polls)


@dataclass(frozen=True)
class Exchanges:
    """Which stores publish, and which of them a wait is for: the last ones before it, which may be
    those of the pass before."""

    group_of: dict[int, int]  # publishing store → its group: those without a wait in between
    sizes: Counter[int]  # stores of each group
    looks: dict[int, tuple[int, int]]  # a branch by which a polling loop is left → that loop
    awaited: dict[int, tuple[int, int]]  # a polling loop's end → a group, and 0 or −1 passes


def find_exchanges(loop: Loop, publish_lines: Collection[str]) -> Exchanges:
    looks = {k: poll for poll in loop.polls for k in looks_of(loop, *poll)}
    ends = {end for _, end in looks.values()}
    group, new = -1, True
    group_of: dict[int, int] = {}
    last: dict[int, int] = {}  # a polling loop's end → the group before it; −1 if there is none
    for k in loop.span():
        i = loop.instructions[k]
        if i.opcode.startswith(("STG", "ST.")) and i.line in publish_lines:
            group, new = group + new, False
            group_of[k] = group
        if k in ends:
            last[k], new = group, True
    if last and not group_of:
        raise ValueError(f"the time loop waits, but none of {sorted(publish_lines)} stores in it")
    awaited = {end: (g, 0) if g >= 0 else (group, -1) for end, g in last.items()}
    return Exchanges(group_of, Counter(group_of.values()), looks, awaited)


def looks_of(loop: Loop, start: int, end: int) -> Iterator[int]:
    """The branches that end a wait when all is there: after a polling loop's loads the first one
    out of it, or if there is none, the one back, which then is not taken; before a loop that looks
    at what was begun earlier the one past it, to where branches of the loop go, too."""
    code = loop.instructions
    branches = [k for k in range(loop.start, end + 1) if code[k].name == "BRA"]
    loaded = max(k for k in range(start, end) if code[k].strong)
    out = {k: to for k in branches if k >= start and (to := loop.target(k) or 0) > end}
    after = [k for k in branches if k > loaded and (k in out or (k == end and code[k].predicate))]
    yield from after[:1]
    before = [k for k in branches if k < start][-1:]
    yield from (k for k in before if code[k].predicate and loop.target(k) in out.values())


# --- one program, clock by clock


class Warp:
    """Where a warp is, and until when what it needs is not there."""

    def __init__(self, start: int) -> None:
        self.at = start
        self.passes = 0
        self.ready = 0.0  # when nothing but a busy unit keeps it from its next instruction
        self.boards = [0.0] * SCOREBOARDS
        self.wgmmas = 0.0  # when all of its wgmmas are done
        self.in_barrier = False
        # By register, what a polling loop has loaded: when L2 was read, then whether it was the
        # data.
        self.loaded: dict[str, float | bool] = {}

    @property
    def done(self) -> bool:
        return self.passes >= PASSES

    def wait(self, i: Instruction, stalled: float) -> None:
        """Its next instruction is `i`, not before `stalled`."""
        self.ready = max([stalled, *(self.boards[b] for b in i.waits)])
        if "DEPBAR" in i.opcode and "WARPGROUP" in i.opcode:
            self.ready = max(self.ready, self.wgmmas)


class Scheduler:
    """One of the four: its warps, and when a unit of it takes an instruction again."""

    def __init__(self, warps: list[Warp]) -> None:
        self.warps = warps
        self.latest = warps[:1]  # the warp that it issued last
        self.free: defaultdict[str, float] = defaultdict(float)


class Simulation:
    """A program of `num_warps` warps that goes through the loop PASSES times."""

    def __init__(
        self,
        loop: Loop,
        exchanges: Exchanges,
        num_warps: int,
        rows_frac: float,
        params: Parameters,
        seed: int,
    ) -> None:
        self.loop, self.exchanges, self.params = loop, exchanges, params
        self.rows_frac = rows_frac
        self.random = random.Random(seed)
        self.now = 0.0
        self.warps = [Warp(loop.start) for _ in range(num_warps)]
        self.schedulers = [Scheduler(self.warps[s::SCHEDULERS]) for s in range(SCHEDULERS)]
        # When what all warps share takes more: the load and store unit, the way from L2.
        self.shared_free = 0.0
        self.l2_free = 0.0
        # By (group, pass): stores so far, the time of the last one, when all of it can be seen.
        self.stores: Counter[tuple[int, int]] = Counter()
        self.published: dict[tuple[int, int], float] = {}
        self.visible = {(g, -1): 0.0 for g in exchanges.sizes}
        self.ends = [0.0] * PASSES  # when the last warp was through
        self.issued: Counter[str] = Counter()
        self.barriers = 0
        # When a warp left a polling loop, began a product, had a load from shared memory.
        self.settled: list[float] = []
        self.products: list[float] = []
        self.loads: list[float] = []

    def run(self) -> "Simulation":
        """Raises RuntimeError if a wait never ends."""
        for _ in range(MAX_CLOCKS):
            if all(warp.done for warp in self.warps):
                return self
            issued = [self.schedule(scheduler) for scheduler in self.schedulers]
            self.now = self.now + 1 if any(issued) else self.next_event()
        raise RuntimeError("the simulation does not end: a wait for what is never published")

    def clocks(self) -> float:
        """Of one pass."""
        return (self.ends[COUNTED] - self.ends[COUNTED - TIMED]) / TIMED

    def schedule(self, scheduler: Scheduler) -> bool:
        """Issue an instruction of the warp of before, else of the first that can; if any can."""
        for warp in (*scheduler.latest, *scheduler.warps):
            if warp.ready > self.now or warp.in_barrier or warp.done:
                continue
            i = self.loop.instructions[warp.at]
            if i.unit in QUEUES or scheduler.free[i.unit] <= self.now:
                scheduler.latest = [warp]
                self.issue(scheduler, warp, i)
                return True
        return False

    def next_event(self) -> float:
        """When any warp can go on. For a wgmma it sleeps, too, until the tensor core is free."""
        times = (
            max(warp.ready, scheduler.free[self.loop.instructions[warp.at].unit])
            for scheduler in self.schedulers
            for warp in scheduler.warps
            if not warp.done and not warp.in_barrier
        )
        return math.ceil(max(self.now + 1, min(times, default=0.0)))

    def issue(self, scheduler: Scheduler, warp: Warp, i: Instruction) -> None:
        counted = warp.passes == COUNTED
        if i.copies in warp.loaded:
            warp.loaded[i.first] = warp.loaded.pop(i.copies)
        self.issued[i.name] += counted
        if times := self.execute(scheduler, warp, i):
            for board, time in zip((i.sets, i.reads), times, strict=True):
                if board < SCOREBOARDS:
                    warp.boards[board] = max(warp.boards[board], time)
        warp.at = self.branch(warp, i) if i.name == "BRA" else warp.at + 1
        warp.wait(self.loop.instructions[warp.at], self.now + max(1, i.stall))
        self.release(counted)

    def release(self, counted: bool) -> None:
        """Let the warps of a barrier go on if the last one has come."""
        waiting = [warp for warp in self.warps if warp.in_barrier]
        if waiting and len(waiting) == sum(not warp.done for warp in self.warps):
            for warp in waiting:
                warp.in_barrier = False
                warp.ready = max(warp.ready, self.now + self.params.barrier)
            self.barriers += counted

    def execute(
        self, scheduler: Scheduler, warp: Warp, i: Instruction
    ) -> tuple[float, float] | None:
        """Take the unit; when the result is there and when the operands have been read. None if
        the instruction does nothing."""
        now, params = self.now, self.params
        done, busy = now + 4.0, 1.0
        if i.unit == "HMMA":
            half = 2 if "1688" in i.opcode and "TF32" not in i.opcode else 1  # m16n8k8 of 16 bits
            busy, done = params.hmma_interval / half, now + params.hmma
            self.products.append(now)
        elif i.unit == "HGMMA":
            self.wgmma(scheduler, warp, i)
        elif i.unit == "MUFU":
            busy, done = params.mufu_interval, now + params.mufu
        elif i.unit == "integer":
            busy = 1.0 if i.opcode.startswith(BRIEF) else 2.0
        elif i.unit == "multiply":
            busy = 2
        elif i.unit == "uniform":
            done = now + 12
        elif i.unit == "BAR":
            warp.in_barrier = True
        elif i.unit == "memory":
            busy = 2
        if i.unit not in QUEUES:
            scheduler.free[i.unit] = now + busy
        if i.unit == "memory":
            return self.access(warp, i)
        if i.opcode.startswith(SPECIAL):
            done = now + params.special
        if i.name == "CS2R" and ("TIMER" in i.text or "CLOCK" in i.text):
            done = now + params.timer
        return done, now + 2

    def wgmma(self, scheduler: Scheduler, warp: Warp, i: Instruction) -> None:
        """A warp's share of 64 × N × 16, N / 8 tiles, queues behind what its tensor core has."""
        shape = re.search(r"64x(\d+)x", i.opcode)
        assert shape
        begin = max(scheduler.free[i.unit], self.now)
        scheduler.free[i.unit] = begin + int(shape[1]) / 8 * self.params.wgmma_tile
        warp.wgmmas = scheduler.free[i.unit] + self.params.wgmma
        self.products.append(self.now)

    def access(self, warp: Warp, i: Instruction) -> tuple[float, float] | None:
        """One of memory, global or shared, or a shuffle: as `execute`."""
        now, params = self.now, self.params
        if i.opcode.startswith(("LDG", "LD.")):
            if not i.strong:
                return self.turn(i, now) + params.weak_load, now + 14
            if i.predicate and warp.loaded.get(i.first) and self.polling(warp.at):
                return None  # its predicate: what is there is not loaded again
            return self.strong_load(warp, i), now + 14
        if i.opcode.startswith(("STG", "ST.")):
            if warp.at in self.exchanges.group_of:
                self.publish(warp)
            return now + 4, self.turn(i, now) + 14
        if i.name == "SHFL":
            return now + params.shuffle, now + 2
        if i.name not in ("LDS", "LDSM", "STS", "STSM", "ATOMS"):
            return now + 30, now + 14
        begin, length = self.turn(i, now + 2), wavefronts(i.opcode)
        if i.name == "LDSM":
            return begin + length + params.ldmatrix - 4, begin + 6
        if i.name == "LDS":
            self.loads.append(begin + length + params.lds - 2)
            return self.loads[-1], begin + 6
        read = begin + length + params.sts_read - 2
        return read + 8, read

    def turn(self, i: Instruction, earliest: float) -> float:
        """When the load and store unit that all warps share takes an access."""
        begin = max(self.shared_free, earliest)
        self.shared_free = begin + wavefronts(i.opcode)
        return begin

    def strong_load(self, warp: Warp, i: Instruction) -> float:
        """When it is back from L2; what it will find is decided when L2 is read."""
        params = self.params
        begin = self.turn(i, self.now)
        jitter = params.l2_jitter * (2 * self.random.random() - 1)
        trip = params.l2_round_trip * (1 + jitter)
        sampled = begin + 4 + trip * params.l2_request
        back = max(sampled + trip * (1 - params.l2_request), self.l2_free)
        size = 128 * wavefronts(i.opcode) * self.rows_frac  # bytes of a warp
        self.l2_free = max(self.l2_free, back) + size / params.l2_bytes_per_clock
        warp.loaded[i.first] = sampled
        return self.l2_free

    def polling(self, at: int) -> bool:
        """Whether an instruction is in a loop that waits."""
        return any(a <= at <= b for a, b in self.loop.polls)

    def publish(self, warp: Warp) -> None:
        group = self.exchanges.group_of[warp.at]
        key = (group, warp.passes)
        self.stores[key] += 1
        self.published[key] = self.now
        if self.stores[key] == len(self.warps) * self.exchanges.sizes[group]:
            self.visible[key] = self.now + self.params.store_visible

    def branch(self, warp: Warp, i: Instruction) -> int:
        """Where a warp goes on: traps and other rare branches are not taken."""
        at, to = warp.at, self.loop.target(warp.at) or 0
        if at == self.loop.end:
            self.ends[warp.passes] = self.now
            warp.passes += 1
            return self.loop.start
        if at in self.exchanges.looks:
            start, end = self.exchanges.looks[at]
            onwards, back = (at + 1, start) if at == end else (to, at + 1)
            return onwards if self.arrived(warp, start, end) else back
        for start, end in self.loop.polls:
            if at == end:
                return start
        if to <= at:
            return at + 1
        # Within a wait, past what only every 64th poll does.
        skips = any(start <= at < to <= end for start, end in self.loop.polls)
        return to if skips or not i.predicate else at + 1

    def arrived(self, warp: Warp, start: int, end: int) -> bool:
        """Whether all that the polling loop has loaded is what it waits for."""
        group, before = self.exchanges.awaited[end]
        visible = self.visible.get((group, warp.passes + before), math.inf)
        registers = {i.first for i in self.loop.instructions[start:end] if i.strong}
        for r in registers & warp.loaded.keys():
            if not isinstance(sampled := warp.loaded[r], bool):
                warp.loaded[r] = sampled >= visible
        if not all(warp.loaded.get(r, True) for r in registers):
            return False
        for r in registers:
            warp.loaded.pop(r, None)
        self.settled.append(self.now)
        return True

    def phases(self) -> list[Phases]:
        """Of each exchange of the pass before the counted one, or that ends in it."""
        if not self.settled:
            return []
        groups = len(self.exchanges.sizes)
        last_of_a_pass = self.published[groups - 1, COUNTED - 2]
        times = sorted(time for time in self.published.values() if time >= last_of_a_pass)
        return [self.phases_between(t0, t1) for t0, t1 in pairwise(times[: groups + 1])]

    def phases_between(self, t0: float, t1: float) -> Phases:
        settled = max(within(self.settled, t0, t1))
        products = within(self.products, t0, t1)
        first = min((t for t in products if t > settled), default=settled)
        result = max(products) + self.params.hmma if products else first
        loads = [t for t in within(self.loads, t0, t1) if not products or t > max(products)]
        reduced = max([result, *loads])
        return Phases(settled - t0, first - settled, result - first, reduced - result, t1 - reduced)


def within(times: list[float], t0: float, t1: float) -> list[float]:
    return [t for t in times if t0 < t <= t1]
