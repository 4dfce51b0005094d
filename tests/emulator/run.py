"""One launch in the emulator: PTX, a grid, parameters and buffers in, findings out."""

import ctypes
import functools
import math
from dataclasses import dataclass, field

from .build import library

MAX_INSTRUCTIONS = 4 * 10**8  # of all warps: a launch of a test takes a hundredth of it at most
MAX_DELAY = 8000  # of a store, in turns of the scheduler


class Config(ctypes.Structure):  # as in machine.h
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("max_instructions", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("delay_mean", ctypes.c_uint32),
        ("delay_max", ctypes.c_uint32),
        ("quantum", ctypes.c_uint32),
        ("missing_cta", ctypes.c_int64),
        ("first_y", ctypes.c_uint32),
        ("count_y", ctypes.c_uint32),
    )


class AllocDesc(ctypes.Structure):  # as in machine.h
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("initialised", ctypes.c_uint32),
        ("once", ctypes.c_uint32),
        ("sentinel_bytes", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("stored_at", ctypes.c_void_p),
        ("unwritten", ctypes.c_uint64),
    )


@dataclass
class Buffer:
    """Memory that a kernel may touch. Sizes are in bytes."""

    address: int  # as the kernel sees it
    host: int
    size: int
    name: str
    initialised: bool = True
    once: bool = False  # each element is to be stored exactly once
    sentinel_bytes: int = 0  # of an element that must never be all ones; 0: any may
    stored_at: int = 0  # where the turn is noted in which each two bytes are stored; 0: nowhere
    unwritten: int = field(default=0, init=False)  # bytes, after the launch


@dataclass
class Result:
    """Of one launch."""

    name: str
    finished: bool
    findings: list[str]
    instructions: int  # of warps
    barriers: int
    timeouts: int  # how often the clock had to jump


class Program:
    """Parsed PTX."""

    def __init__(self, ptx: str, kernel: str) -> None:
        error = ctypes.create_string_buffer(500)
        self.handle = library().emulator_load(ptx.encode(), kernel.encode(), error, len(error))
        if not self.handle:
            raise ValueError(f"{kernel}: {error.value.decode()}")
        self.parameters = library().emulator_parameters(self.handle)


parsed = functools.lru_cache(maxsize=256)(Program)


def run(
    ptx: str, kernel: str, grid: tuple[int, int, int], threads: int, shared_bytes: int,
    parameters: list[int], buffers: list[Buffer], *, seed: int, missing: int = -1,
    first_y: int = 0, count_y: int = 0, max_instructions: int = MAX_INSTRUCTIONS,
) -> Result:  # fmt: skip
    """Run a grid. parameters: the kernel's, as integers (pointers: addresses within `buffers`).

    missing: the number of a program that never runs. first_y, count_y: the grid's programs along y
    are those from first_y on of so many."""
    program = parsed(ptx, kernel)
    # Triton's own: where a kernel's scratch memory is, of which these have none.
    parameters = parameters + [0] * (program.parameters - len(parameters))
    if len(parameters) != program.parameters:
        raise ValueError(f"{kernel} takes {program.parameters} parameters, not {len(parameters)}")
    # Drawn from the seed, so that a few seeds see quite different machines.
    warps = math.prod(grid) * threads // 32
    quantum = (64, 8, 300, 24)[seed % 4]
    delay_mean = (warps, 4 * warps, 0, 20 * warps)[seed // 2 % 4]
    config = Config(
        seed=seed, max_instructions=max_instructions, grid=(ctypes.c_uint32 * 3)(*grid),
        threads=threads, shared_bytes=shared_bytes, delay_mean=delay_mean, delay_max=MAX_DELAY,
        quantum=quantum, missing_cta=missing, first_y=first_y, count_y=count_y,
    )  # fmt: skip
    described = (AllocDesc * max(len(buffers), 1))(*map(_describe, buffers))
    values = (ctypes.c_uint64 * len(parameters))(*(p & (1 << 64) - 1 for p in parameters))
    totals, report = (ctypes.c_uint64 * 3)(), ctypes.c_char_p()
    failed = library().emulator_run(
        program.handle, ctypes.addressof(config), ctypes.addressof(described), len(buffers),
        ctypes.addressof(values), ctypes.addressof(totals), ctypes.addressof(report),
    )  # fmt: skip
    for buffer, description in zip(buffers, described, strict=False):
        buffer.unwritten = description.unwritten
    findings = report.value.decode().splitlines() if report.value else []
    return Result(kernel, not failed, findings, *totals)


def _describe(b: Buffer) -> AllocDesc:
    return AllocDesc(
        b.address, b.host, b.size, b.initialised, b.once, b.sentinel_bytes, 0, b.name.encode(),
        b.stored_at,
    )  # fmt: skip
