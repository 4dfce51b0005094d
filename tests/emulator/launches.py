"""The library's launches, run in the emulator instead of on a device."""

import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from trigru import backward, forward, launch, tiles

from .ptx import compile_as_jit
from .run import MAX_INSTRUCTIONS, Buffer, Result, run

BASE, GUARD = 0x7F00_0000_0000, 1 << 20  # device addresses: made up, with gaps between tensors
INTEGER = {2: torch.int16, 4: torch.int32}
# After how many polls a wait gives up. Programs may be very late here; some never come.
POLLS, POLLS_IN_VAIN = 100_000, 200
KERNELS = (
    (forward, "_gru_forward_kernel"), (backward, "_gru_backward_kernel"),
    (tiles, "_pack_resets_kernel"),
)  # fmt: skip


@dataclass(frozen=True)
class Roles:
    """What a kernel does with its pointer arguments; it only reads the others."""

    outputs: set[str] = field(default_factory=set)  # stored once, unwritten before
    exchanged: set[str] = field(default_factory=set)  # the same, and awaited by other programs


ROLES = {
    "_gru_forward_kernel": Roles({"gates_ptr", "h_n_ptr"}, {"y_ptr", "rh_ptr"}),
    "_gru_backward_kernel": Roles({"dgx_ptr", "dh0_ptr", "dreset_ptr", "dscale_ptr"}, {"dgh_ptr"}),
    "_pack_resets_kernel": Roles({"words_ptr"}),
    "_exchange_kernel": Roles(exchanged={"y_ptr"}),
}
# The rest of what is known of arguments: those that a large batch does not make larger, and those
# that have a row for each sequence, not for each step of one.
WITHOUT_ROWS = {"w_hh_ptr", "b_hh_ptr", "reset_state_ptr", "error_ptr"}
ROW_A_SEQUENCE = {"h0_ptr", "h_n_ptr", "dh_n_ptr", "dh0_ptr", "dreset_ptr"}


EXCHANGED = set.union(*(roles.exchanged for roles in ROLES.values()))


def tile_rows(bound: dict[str, Any]) -> int:
    """Batch rows of a program's tile."""
    return bound["rows"]


@dataclass
class Emulator:
    """While entered, the library's launchers run their kernels in the emulator."""

    sm: int = 90
    tf32: bool = False  # as torch.backends.cudnn.rnn.fp32_precision == "tf32" on a GPU
    seed: int = 0
    missing: int = -1  # the number of a program that never runs
    far: int = 0  # if set, the one batch tile is this one of a batch that ends with it: see `_far`
    mutate: Callable[[str], str] | None = None  # of the PTX
    max_instructions: int = MAX_INSTRUCTIONS
    kernels: tuple = KERNELS  # (module, name) of each that is launched
    timed: str = ""  # the pointer argument of a tensor of whose elements `stored_at` tells
    stored_at: torch.Tensor | None = None  # in which turn of the scheduler: as that tensor
    results: list[Result] = field(default_factory=list)

    @property
    def findings(self) -> list[str]:
        return [f"{r.name}: {finding}" for r in self.results for finding in r.findings]

    @property
    def faults(self) -> list[str]:
        return [finding for finding in self.findings if "note: " not in finding]

    def __enter__(self) -> "Emulator":
        with ExitStack() as stack:
            for module, name in self.kernels:
                stand_in = _Emulated(getattr(module, name), self)
                stack.enter_context(patch.object(module, name, stand_in))
            stack.enter_context(patch.object(launch, "uses_tf32", lambda device: self.tf32))
            polls = POLLS_IN_VAIN if self.missing >= 0 else POLLS
            stack.enter_context(patch.object(launch, "WAIT_POLLS", polls))
            self._patches = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()


@dataclass
class _Emulated:
    """Stands in for a kernel."""

    kernel: Any
    emulator: Emulator

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launch(grid, args, kwargs)

    def launch(self, grid: tuple[int, int, int], args: tuple, kwargs: dict) -> None:
        e = self.emulator
        cooperative = kwargs.get("launch_cooperative_grid", False)  # do programs await each other?
        ptx, bound, passed = compile_as_jit(self.kernel, e.sm, args, kwargs)
        text = e.mutate(ptx.text) if e.mutate else ptx.text
        roles = ROLES.get(self.kernel.__name__, Roles())
        buffers, addresses = _buffers(passed, roles, cooperative)
        turns = self.timed(passed, buffers) if e.timed else torch.empty(0)
        how: dict[str, int] = {}
        if e.far:
            buffers, passed = _far(passed, tile_rows(bound), buffers, addresses, e.far)
            how = {"first_y": e.far, "count_y": e.far + 1}
        parameters = [addresses[k] if k in addresses else _bits(v) for k, v in passed.items()]
        result = run(
            text, ptx.name, grid, 32 * ptx.num_warps, ptx.shared_bytes, parameters, buffers,
            seed=e.seed, missing=e.missing, max_instructions=e.max_instructions, **how,
        )  # fmt: skip
        e.results.append(result)
        if e.timed:
            e.stored_at = turns.unflatten(0, passed[e.timed].shape)[..., 0]
        if result.finished and e.missing < 0 and not e.far:
            result.findings += _never_written(passed, buffers, grid)

    def timed(self, passed: dict[str, Any], buffers: list[Buffer]) -> torch.Tensor:
        """Room for the turns in which the timed tensor is stored, two bytes by two."""
        (buffer,) = (b for b in buffers if b.name == self.emulator.timed)
        tensor = passed[buffer.name]
        turns = torch.zeros(tensor.numel(), tensor.itemsize // 2, dtype=torch.int32)
        buffer.stored_at = turns.data_ptr()
        return turns


def _bits(scalar: int | float) -> int:
    """A parameter as it lies in memory; a float is of 32 bits."""
    return (
        int.from_bytes(struct.pack("f", scalar), "little") if isinstance(scalar, float) else scalar
    )


def _buffers(
    passed: dict[str, Any], roles: Roles, cooperative: bool
) -> tuple[list[Buffer], dict[str, int]]:
    """A buffer for each tensor (one for several names of the same memory), and their addresses.

    Exchanged memory holds the sentinel before the launch, where programs wait for each other."""
    buffers: list[Buffer] = []
    addresses, at = {}, BASE
    for name, t in passed.items():
        if not isinstance(t, torch.Tensor):
            continue
        size = t.numel() * t.itemsize
        assert t.is_contiguous(), name
        same = [b for b in buffers if size and b.host == t.data_ptr() and b.size == size]
        if same:
            addresses[name] = same[0].address
            same[0].name += "=" + name
            continue
        # As CUDA's allocator aligns storages; views keep their offset.
        addresses[name] = at + t.storage_offset() * t.itemsize % 512
        exchanged = name in roles.exchanged
        once = exchanged or name in roles.outputs
        buffer = Buffer(addresses[name], t.data_ptr(), size, name, once=once)
        buffer.initialised = not once or (exchanged and cooperative)
        buffer.sentinel_bytes = t.itemsize if exchanged and cooperative else 0
        buffers.append(buffer)
        at += (size + GUARD + 511) // 512 * 512
    return buffers, addresses


def _never_written(
    passed: dict[str, Any], buffers: list[Buffer], grid: tuple[int, int, int]
) -> list[str]:
    """A line for each buffer of which this launch has not computed all that it should.

    The D recurrences may be those of several launches: each writes its part of the outputs. Of what
    is exchanged the last one knows whether the sentinel is left in anything but padding."""
    D, _, H = _state_shape(passed)
    if "first_direction" not in passed:  # its one launch is of all recurrences
        return [
            f"output: {b.unwritten} of {b.name} were never written"
            for b in buffers
            if b.once and b.unwritten
        ]
    last = passed["first_direction"] + grid[2] == D
    found = []
    for b in buffers:
        if not b.once:
            continue
        if b.sentinel_bytes:
            count = _sentinels(passed[b.name.split("=")[0]], H) if last else 0
        else:
            count = b.unwritten - b.size * (D - grid[2]) // D
        if count:
            found.append(f"output: {count} of {b.name} were never written")
    return found


def _state_shape(passed: dict[str, Any]) -> tuple[int, int, int | None]:
    """(D, B, H); of a kernel that has no states, one recurrence of no rows and all units."""
    for name in ("h_n_ptr", "dh0_ptr"):
        if name in passed:
            return tuple(passed[name].shape)
    if "words_ptr" in passed:
        D, _, B = passed["words_ptr"].shape
        return D, B, None
    return 1, 0, None


def _sentinels(exchanged: torch.Tensor, H: int | None) -> int:
    return int((exchanged[..., :H].view(INTEGER[exchanged.itemsize]) == -1).sum())


def _far(
    passed: dict[str, Any], rows: int, buffers: list[Buffer], addresses: dict[str, int], tile: int
) -> tuple[list[Buffer], dict[str, Any]]:
    """The launch, as if its one batch tile were the last of a batch so large that offsets exceed 32
    bits. Each step's rows lie where they would lie then; nothing lies between them."""
    D, B, _ = _state_shape(passed)
    assert D == 1 and B <= rows, "one tile of one recurrence"
    row0 = tile * rows
    windows: list[Buffer] = []
    for i, b in enumerate(buffers):
        names = b.name.split("=")
        address = BASE + i * (1 << 45)
        addresses |= dict.fromkeys(names, address)
        begins = _first_rows(names[0], passed[names[0]], B, row0)
        size = b.size // len(begins)
        row_bytes = 0 if names[0] in WITHOUT_ROWS else size // B
        windows += [
            replace(b, address=address + begin * row_bytes, host=b.host + k * size, size=size)
            for k, begin in enumerate(begins)
        ]
    return windows, {**passed, "B": row0 + B}


def _first_rows(name: str, tensor: torch.Tensor, B: int, row0: int) -> list[int]:
    """Where the tile's rows begin in such a batch, in each step that the tensor has."""
    if name in WITHOUT_ROWS or name in ROW_A_SEQUENCE or not tensor.numel():
        return [row0]
    # (T, B, …); or as kernels exchange it: (N, D, …), of y with rows of h0 and resets behind; or
    # words of resets: (D, words, B)
    steps = tensor.shape[0]
    if tensor.dtype == torch.int32:
        steps = tensor.shape[1]
    elif name in EXCHANGED and tensor.dim() == 3:
        steps //= B
    return [t * (row0 + B) + row0 for t in range(steps)]
