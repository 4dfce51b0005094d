"""The wait's inline PTX, run by a toy machine: no test without a GPU executes it otherwise."""

import re
from itertools import product
from random import Random

import pytest

from trigru.exchange import _spin_asm, _spin_constraints

CASES = pytest.mark.parametrize("vectors, bits", list(product((1, 2, 4, 8), (16, 32))))
BASE, FLAG = 0x7F00_0000_0000, 0x7E00_0000_0000
START, TICK, LONG = 1_700_000_000_000_000_000, 100, 5_000  # ns: first, each look after, a limit
HALVES = [0, 0, 1, 0x7FFF, 0x8000, 0xFF00, 0xFFFD, 0xFFFE, 0xFFFE, 0xFFFF, 0xFFFF]
STATEMENT = re.compile(r"(?:@(!?)(\w+) )?([\w.]+)(.*);|(\w+):|[{}]")
COMPUTE = {  # anything else is unknown and raises
    **dict.fromkeys(["mov.b32", "mov.u64", "mov.pred"], lambda a: a),
    "setp.ne.u32": lambda a, b: a != b,
    "setp.eq.u32": lambda a, b: a == b,
    "setp.lt.s64": lambda a, b: a < b,
    "or.pred": lambda a, b: a or b,
    "and.b32": lambda a, b: a & b,
    "max.u32": max,
    "sub.u32": lambda a, b: (a - b) % 2**32,
    "lop3.b32": lambda a, b, c, table: {0xEA: a & b | c}[table],
}


class Tile:
    """The vectors that one thread awaits. Other programs fill them in, one element at a time."""

    def __init__(self, rng, vectors, bits, never=0):
        self.rng, self.bits, self.sentinel = rng, bits, 2**bits - 1
        self.now = [self.sentinel] * (vectors * 128 // bits)
        self.final = [self.random_element() for _ in self.now]  # what it has to become
        self.to_come = rng.sample(range(len(self.now)), len(self.now))
        for _ in range(never):
            self.final[self.to_come.pop()] = self.sentinel
        self.vectors = rng.sample(range(BASE, BASE + 4096, 16), vectors)  # where each one is
        self.addresses = [v + i for v in self.vectors for i in range(0, 16, bits // 8)]

    def random_element(self):
        halves = [self.rng.choice([*HALVES, self.rng.getrandbits(16)]) for _ in range(2)]
        return min((halves[0] | halves[1] << 16) % 2**self.bits, self.sentinel - 1)

    def arrive(self, count):
        for _ in range(min(count, len(self.to_come))):
            i = self.to_come.pop()
            self.now[i] = self.final[i]

    def words(self, elements):
        if self.bits == 32:
            return elements[:]
        return [elements[i] | elements[i + 1] << 16 for i in range(0, len(elements), 2)]

    def load(self, address, held):
        """The 4 words there; elements may arrive between any two. `held`: what the thread has of
        them so far. Of these something must be missing, or there is nothing to load for."""
        elements = [word >> s & self.sentinel for word in held for s in range(0, 32, self.bits)]
        assert self.sentinel in elements
        for at in range(4):
            self.arrive(self.rng.randrange(3))
            yield self.words(self.now)[4 * self.vectors.index(address) + at]


def wait(tile, limit=LONG):
    """What one thread returns, how often it loads, what it stores where, its last clock."""
    vectors, elements = len(tile.vectors), len(tile.addresses)
    lines = _spin_asm(vectors, tile.bits).split("\n")
    code = [STATEMENT.fullmatch(line).groups() for line in lines]
    peeked_and_addresses = tile.words(tile.now) + tile.addresses
    inputs = peeked_and_addresses + [START + limit] * elements + [FLAG] * elements
    inputs = {f"${4 * vectors + i}": value for i, value in enumerate(inputs)}
    registers, clock, loads, stored, at, steps = dict(inputs), START, 0, {}, 0, 0

    def value(name):
        return int(name, 0) if name[0].isdigit() else registers[name]

    while at < len(code):
        negated, guard, opcode, arguments, _ = code[at]
        at, steps = at + 1, steps + 1
        assert steps < 20_000, "it never ends"
        if opcode in (None, ".reg") or (guard and registers[guard] == bool(negated)):
            continue
        *into, last = re.findall(r"[^][{}, ]+", arguments) or [None]
        if opcode == "bra":
            at = [label for *_, label in code].index(last)
        elif opcode == "st.relaxed.sys.global.b32":
            stored[value(into[0])] = value(last)
        elif opcode == "ld.relaxed.gpu.global.v4.b32":
            registers.update(zip(into, tile.load(value(last), map(value, into)), strict=True))
            loads += 1
        else:
            clock += TICK if last == "%globaltimer" else 0
            registers["%globaltimer"] = clock
            registers[into[0]] = COMPUTE[opcode](*map(value, [*into[1:], last]))
    assert inputs.items() <= registers.items()
    return [registers[f"${i}"] for i in range(4 * vectors)], loads, stored, clock


@CASES
def test_a_wait_returns_all_of_the_tile_and_loads_only_what_is_missing(vectors, bits):
    rng = Random(0)
    for _ in range(20):
        tile = Tile(rng, vectors, bits)
        tile.arrive(rng.choice([0, 1, rng.randrange(len(tile.to_come)), len(tile.to_come) - 1]))
        words, loads, stored, _ = wait(tile)
        assert words == tile.words(tile.final) and loads > 0 and stored == {}


@CASES
@pytest.mark.parametrize("limit", [LONG, -LONG])
def test_a_tile_that_had_arrived_costs_no_load_and_meets_no_deadline(vectors, bits, limit):
    tile = Tile(Random(0), vectors, bits)
    tile.arrive(len(tile.to_come))
    assert wait(tile, limit) == (tile.words(tile.final), 0, {}, START)


@CASES
@pytest.mark.parametrize("never", [1, 2, 4])
def test_a_wait_for_what_never_arrives_ends_at_the_deadline_and_sets_the_flag(vectors, bits, never):
    tile = Tile(Random(0), vectors, bits, never)
    tile.arrive(len(tile.to_come) // 2)
    words, _, stored, clock = wait(tile)
    assert words == tile.words(tile.final) and stored == {FLAG: 1}
    assert clock == START + LONG  # the first look at the clock that is not before it


@CASES
def test_the_constraints_describe_the_operands(vectors, bits):
    # Words out and in; for each element its address, the deadline and the flag.
    constraints = _spin_constraints(vectors, bits).split(",")
    words, elements = 4 * vectors, vectors * 128 // bits
    assert constraints[:words] == ["=&r"] * words  # written while inputs are still to be read
    assert constraints[words:] == ["r"] * words + ["l"] * 3 * elements
    used = {int(n) for n in re.findall(r"\$(\d+)", _spin_asm(vectors, bits))}
    assert used.issuperset(range(2 * words)) and used.issubset(range(len(constraints)))
