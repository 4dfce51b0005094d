"""One case: both kernels in the emulator, against float64 by the library's own rule."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from numerics import offsets_of
from torch.utils._python_dispatch import TorchDispatchMode

from perf.compiling import TARGETS
from trigru import backward, derivatives, forward, launch, reference
from trigru.accuracy import problem, violations, yardsticks
from trigru.plan import LaunchPlan, candidates, plan_launch

from .launches import INTEGER, Emulator
from .run import MAX_INSTRUCTIONS

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32,
}  # fmt: skip
DIFFERENTIABLE = ("reset_state", "update_scale")  # of what nn.GRU does not have
IN_ROWS = {
    "gx",
    "dy",
    "y",
    "dgx",
    "update_scale",
    "dupdate_scale",
}  # (…, D, width); the others are (D, …)
WARPS = 4  # of a program of a small group


@dataclass(frozen=True)
class Case:
    """A problem, a plan for it, and what is to go wrong."""

    sm: int
    precision: str
    textbook: bool
    H: int
    B: int
    T: int
    seed: int = 0  # of the numbers and of the schedule
    form: str = ""  # of the plan: see `plan_of`; "": what the library would choose
    D: int = 1
    lengths: tuple[int, ...] | None = None  # of packed sequences
    reverse: bool = False
    bias: bool = True
    save: bool = True
    resets: str = ""  # "zero" or "learned", the reset state
    scaled: bool = False  # with an update_scale
    clip: float | None = None
    heads: int = 1
    loss: str = ""  # of "y" or "h_n" alone
    carried: bool = (
        False  # h0 in float32; the rule is that of one in 16 bits, h_n's bits are a test's
    )
    batch_programs: int | None = None  # fewer than tiles: they follow one another
    directions: int | None = None  # of a launch
    poison: str = ""  # "nan", "inf" or "held" (an infinity that stays) in one row of `where`
    where: str = "gx"
    row: int = 1
    missing: bool = False  # one of the programs never runs
    offset: int = 0  # of every input in its storage: not aligned to 16 bytes
    far: int = 0  # the tile's number in a huge batch
    again: int = 0  # so many runs more, with other schedules: the same bits

    def __str__(self) -> str:
        given = [f for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        variant = "textbook" if self.textbook else "torch"
        values = " ".join(f"{f.name}={getattr(self, f.name)}" for f in given)
        return f"sm_{self.sm} {self.precision} {variant} {values}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def walk(self) -> dict[str, bool]:
        both = self.D >= 2 * self.heads and not self.reverse
        return {"reverse": self.reverse, "bidirectional": both, "heads": self.heads}

    @property
    def mask(self) -> torch.Tensor | None:
        """The resets: random ones, and of all sequences before the second step."""
        if not self.resets:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.T, self.B, self.D) if self.lengths is None else (sum(self.lengths), self.D)
        mask = torch.rand(shape, generator=generator) < 0.3
        if self.lengths is None:
            mask[1:2] = True
        return mask

    @property
    def modifiers(self) -> dict[str, Any]:
        """What is not differentiable of that which nn.GRU cannot do."""
        given = {"resets": self.mask, "clip": self.clip}
        given = {name: value for name, value in given.items() if value is not None}
        return given | ({"heads": self.heads} if self.heads > 1 else {})

    @property
    def offsets(self) -> torch.Tensor | None:
        return None if self.lengths is None else offsets_of(list(self.lengths))


# Small plans of each kind: few programs, few warps, and tiles of which not all rows are real.
FORMS: dict[str, dict[str, Any]] = {
    "solo": {"solo": True, "BLOCK_B": 8, "rows": 8},
    "solo16": {"solo": True, "BLOCK_B": 16, "rows": 13},
    "solo wgmma": {"solo": True, "BLOCK_B": 16, "rows": 13, "u_shared": 1, "wgmma": True},
    "latency": {"split": True, "BLOCK_B": 8, "rows": 7},
    "latency 8 warps": {"split": True, "BLOCK_B": 8, "rows": 7, "num_warps": 8},
    "latency16": {"split": True, "BLOCK_B": 16, "rows": 13},
    "latency shared": {"split": True, "BLOCK_B": 8, "rows": 7, "u_shared": 1},
    "throughput": {"BLOCK_H": 32, "BLOCK_B": 16, "rows": 13, "stages": 2},
    "throughput wgmma": {"BLOCK_H": 64, "BLOCK_B": 16, "rows": 13, "stages": 2, "wgmma": True},
}
FORMS["throughput wgmma 8 warps"] = FORMS["throughput wgmma"] | {"num_warps": 8}


def plan_of(case: Case, *, backward: bool) -> LaunchPlan:
    """The library's plan for the case or, where it names a form, a small plan of that form."""
    itemsize = case.dtype.itemsize
    if case.form.startswith("tile "):  # one of those that the library chooses from, not quite full
        tiles = tiles_of_library(case, backward=backward)
        number = int(case.form.removeprefix("tile ")) % len(tiles)
        plan = replace(tiles[number], rows=tiles[number].BLOCK_B - 1, batch_programs=2)
    elif not case.form:
        plan = plan_launch(
            TARGETS[case.sm], B=case.B, H=case.H, D=case.D, itemsize=itemsize,
            backward=backward, textbook=case.textbook, exact=case.precision == "ieee",
        )  # fmt: skip
    else:
        form = FORMS[case.form]
        tiles = _tiles_of(case.H, itemsize, **form)
        plan = LaunchPlan(
            H=case.H, D=case.D, bits=8 * itemsize, directions=case.D, batch_programs=8,
            shared_bytes=0, newer=case.sm >= 90, **(form | tiles),
        )  # fmt: skip
    changes = {"batch_programs": case.batch_programs, "directions": case.directions}
    return replace(plan, **{k: v for k, v in changes.items() if v})


def tiles_of_library(case: Case, *, backward: bool) -> list[LaunchPlan]:
    return list(
        candidates(
            TARGETS[case.sm], B=case.B, H=case.H, D=case.D, itemsize=case.dtype.itemsize,
            backward=backward, textbook=case.textbook, exact=case.precision == "ieee",
        )
    )  # fmt: skip


def _tiles_of(
    H: int,
    itemsize: int,
    solo: bool = False,
    split: bool = False,
    wgmma: bool = False,
    BLOCK_H: int = 16,
    BLOCK_B: int = 8,
    num_warps: int = WARPS,
    **_: Any,
) -> dict[str, int]:
    if solo:
        H_pad = max(16, 1 << (H - 1).bit_length())
        warps = min(H_pad // 16 * BLOCK_B // 8, 16 if wgmma else 8)
        return {"H_pad": H_pad, "BLOCK_H": H_pad, "num_warps": warps}
    if split:  # the least that can be multiplied at once is a chunk
        least = 64 // itemsize * num_warps
        H_pad = -(-H // least) * least
        return {"H_pad": H_pad, "BLOCK_H": 16, "num_warps": num_warps, "chunks": H_pad // least}
    least = max(128 // itemsize * (4 * num_warps // BLOCK_B), BLOCK_H)
    chunks = -(-H // least)
    return {"H_pad": chunks * least, "num_warps": num_warps, "chunks": chunks, "u_shared": chunks}


class _Tf32Products(TorchDispatchMode):
    """Products of float32 matrices as tensor cores do them: operands rounded to TF32."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            first = 1 if name in ("addmm", "baddbmm") else 0
            args = tuple(_tf32(a) if i >= first else a for i, a in enumerate(args))
        return function(*args, **(kwargs or {}))


def _tf32(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def launched(case: Case, inputs: dict, cotangents: dict, emulator: Emulator) -> tuple:
    """Forward through the library's launcher, y, h_n and the gates; and backward, what that
    returns, or nothing, if there is nothing saved or nothing right to go on with."""
    how = {"offsets": case.offsets, "textbook": case.textbook, **case.walk, **case.modifiers}
    how |= {k: inputs[k] for k in DIFFERENTIABLE if k in inputs}
    main = {k: v for k, v in inputs.items() if k not in DIFFERENTIABLE}
    with emulator:
        results = forward.gru_forward(
            **main, **how, save=case.save, plan=plan_of(case, backward=False)
        )
        if not case.save or case.missing:
            return results, ()
        y, _, gates = results
        gradients = backward.gru_backward(
            *(None if case.loss not in ("", k) else cotangents[f"d{k}"] for k in ("y", "h_n")),
            main["h0"], main["w_hh"], y, gates, **how, plan=plan_of(case, backward=True),
        )  # fmt: skip
    launch.raise_if_failed(y.device)
    return results, gradients


def run_kernels(
    case: Case, inputs: dict, cotangents: dict, emulator: Emulator
) -> dict[str, torch.Tensor]:
    """The results of both launches, by name, and of the library's weight gradients."""
    (y, h_n, gates), gradients = launched(case, inputs, cotangents, emulator)
    if not gradients:
        return {"y": y, "h_n": h_n}
    dgx, dgh, dh0, dreset_state, dscale = gradients
    resets = {k: v for k, v in (case.modifiers | inputs).items() if k.startswith("reset")}
    before = reference.states_before(y, inputs["h0"], case.offsets, **case.walk, **resets)
    dw_hh, db_hh = (
        derivatives.weight_gradients(dgx, before, gates[..., 0, :] * before)
        if case.textbook
        else derivatives.weight_gradients(dgh, before, before)
    )
    named = {"y": y, "h_n": h_n, "dgx": dgx, "dh0": dh0, "dw_hh": dw_hh}
    if inputs["b_hh"] is not None:
        named["db_hh"] = db_hh
    if "reset_state" in inputs:
        named["dreset_state"] = dreset_state.sum(1)
    if "update_scale" in inputs:
        named["dupdate_scale"] = dscale
    return named


def problem_of(case: Case) -> tuple[dict, dict]:
    torch.manual_seed(case.seed)
    inputs, cotangents = problem(
        case.T, case.B, case.D, case.H, dtype=case.dtype, textbook=case.textbook,
        offsets=case.offsets,
    )  # fmt: skip
    if not case.bias:
        inputs["b_hh"] = None
    if case.resets == "learned":
        inputs["reset_state"] = torch.randn(case.D, case.H).to(case.dtype)
    if case.scaled:
        inputs["update_scale"] = torch.randn_like(inputs["gx"][..., : case.H])
    if case.carried:
        inputs["h0"] = torch.randn(inputs["h0"].shape)
    for name in ("dy", "dh_n"):
        if case.loss not in ("", name[1:]):
            cotangents[name].zero_()
    if case.poison == "held":  # by gates that +inf in unit 0 closes: all other units stay finite
        column = inputs["w_hh"][..., 0]
        column.copy_(column.abs() + 2**-6)
        if case.textbook:
            column[:, case.H : 2 * case.H].neg_()
    moved = ({k: _moved(v, case.offset) for k, v in x.items()} for x in (inputs, cotangents))
    return tuple(moved) if case.offset else (inputs, cotangents)


def _moved(t: torch.Tensor | None, offset: int) -> torch.Tensor | None:
    """The same numbers, contiguous, but so many elements after their storage's begin."""
    if t is None:
        return None
    view = t.new_zeros(t.numel() + offset)[offset:].view(t.shape)
    return view.copy_(t)


def what_is_wrong(
    case: Case, mutate: Callable | None = None, max_instructions: int = MAX_INSTRUCTIONS
) -> tuple[list[str], list[Emulator]]:
    """A line for each fault of the case, and the emulators that ran it."""
    emulators: list[Emulator] = []

    def emulator(seed: int = 0) -> Emulator:
        made = Emulator(
            sm=case.sm, tf32=case.precision == "tf32", seed=case.seed + seed,
            missing=1 if case.missing else -1, far=case.far, mutate=mutate,
            max_instructions=max_instructions,
        )  # fmt: skip
        emulators.append(made)
        return made

    try:
        wrong = _compared(case, *problem_of(case), emulator)
    except launch.ExchangeTimeout as error:
        wrong = [str(error)]
    faults = [fault for e in emulators for fault in e.faults]
    if case.missing:  # which the emulator may notice before the wait does
        faults = [fault for fault in faults if "x no progress: " not in fault]
    return faults + wrong, emulators


def _compared(case: Case, inputs: dict, cotangents: dict, emulator: Callable) -> list[str]:
    clean = run_kernels(case, inputs, cotangents, emulator())
    if case.missing:
        return _missing(clean)
    if case.poison:
        poisoned = poison(case, inputs)
        actual = run_kernels(case, poisoned, cotangents, emulator())
        return _poisoned(case, clean, actual, _yardsticks(case, poisoned, cotangents)[0])
    if case.clip is not None:
        return _clipped(case, inputs, cotangents, emulator())
    wrong = []
    for seed in range(1, case.again + 1):
        other = run_kernels(case, inputs, cotangents, emulator(77 * seed))
        wrong += [f"{k}: other bits" for k, v in other.items() if not torch.equal(v, clean[k])]
    exact, yardstick = _yardsticks(case, inputs, cotangents)
    # Also of TF32 without a floor of its roundings: the yardstick's operands are rounded alike.
    return wrong + violations(clean, {k: exact[k] for k in clean}, {k: yardstick[k] for k in clean})


def _clipped(case: Case, inputs: dict, cotangents: dict, emulator: Emulator) -> list[str]:
    """Whether a state next to the clip is beyond it may be rounding's doing, which the gradient
    then shows: the walk back is compared with the reference's from the same saved tensors."""
    (y, h_n, gates), gradients = launched(case, inputs, cotangents, emulator)
    exact, yardstick = _yardsticks(case, inputs, cotangents)
    limit = y.new_tensor(case.clip)
    wrong = [] if y.abs().max() == limit else [f"states up to {y.abs().max()}, not {limit}"]
    wrong += violations(
        {"y": y, "h_n": h_n}, *({k: e[k] for k in ("y", "h_n")} for e in (exact, yardstick))
    )

    def walked_back(dtype: torch.dtype) -> dict:
        saved = cotangents["dy"], cotangents["dh_n"], inputs["h0"], inputs["w_hh"], y, gates
        how = {k: inputs[k].to(dtype) for k in DIFFERENTIABLE if k in inputs}
        products = _Tf32Products() if case.precision == "tf32" else nullcontext()
        with products:
            results = reference.gru_backward(
                *(t.to(dtype) for t in saved), case.offsets, textbook=case.textbook,
                **case.walk | case.modifiers | {"clip": limit.item()} | how,
            )  # fmt: skip
        return {str(i): t for i, t in enumerate(results)}

    actual = {str(i): t for i, t in enumerate(gradients)}
    return wrong + violations(actual, walked_back(torch.float64), walked_back(case.dtype))


def _yardsticks(case: Case, inputs: dict, cotangents: dict) -> tuple[dict, dict]:
    """Of float64, and of PyTorch; an ensemble's are those of its members, two by two."""
    if case.D <= 2 * case.heads:
        return _yardsticks_of(case, inputs, cotangents, case.modifiers)
    parts = []
    for d in range(0, case.D, 2):
        modifiers = case.modifiers
        if case.mask is not None:
            modifiers["resets"] = case.mask[..., d : d + 2]
        parts.append(_yardsticks_of(case, pair(inputs, d), pair(cotangents, d), modifiers))
    return tuple(_joined([part[i] for part in parts]) for i in (0, 1))


def _yardsticks_of(
    case: Case, inputs: dict, cotangents: dict, modifiers: dict
) -> tuple[dict, dict]:
    how = {"textbook": case.textbook, "reverse": case.reverse, "offsets": case.offsets}
    how |= modifiers
    exact, yardstick = yardsticks(inputs, cotangents, **how)
    if case.precision == "tf32":
        with _Tf32Products():
            _, yardstick = yardsticks(inputs, cotangents, **how)
    return exact, yardstick


def pair(tensors: dict, d: int) -> dict:
    """Of an ensemble, its members d and d + 1."""
    return {
        k: None if t is None else t.narrow(-2 if k in IN_ROWS else 0, d, 2).contiguous()
        for k, t in tensors.items()
    }


def _joined(parts: list[dict]) -> dict:
    return {k: torch.cat([p[k] for p in parts], -2 if k in IN_ROWS else 0) for k in parts[0]}


def _missing(results: dict) -> list[str]:
    """Without one of its programs a group gives up, says so, and yields NaN, not numbers."""
    wrong = [] if results["y"][1:].isnan().all() else ["numbers, although a program was missing"]
    try:
        launch.raise_if_failed(results["y"].device)
    except launch.ExchangeTimeout:
        return wrong
    return [*wrong, "no ExchangeTimeout"]


def poison(case: Case, inputs: dict) -> dict:
    """The inputs, but one row has NaNs of the sentinel's own bits, or an infinity."""
    poisoned = dict(inputs, **{case.where: inputs[case.where].clone()})
    tensor = poisoned[case.where]
    row = tensor[2, case.row] if case.where == "gx" else tensor[:, case.row]
    if case.poison == "nan":
        row.view(INTEGER[row.itemsize]).fill_(-1)
    else:
        row[..., 0] = float("inf")
    return poisoned


def _poisoned(case: Case, clean: dict, actual: dict, exact: dict) -> list[str]:
    """The other rows must not notice, and the same elements are NaN as in float64, without padding,
    tiles and exchange."""
    wrong = []
    stays = case.poison == "nan" and not case.resets
    if stays and not actual["h_n"][:, case.row].isnan().all():
        wrong.append("a NaN got lost")
    for name in ("y", "h_n", "dgx", "dh0"):
        rows = _other_rows(case, actual[name])
        if not torch.equal(actual[name][rows], clean[name][rows]):
            wrong.append(f"{name}: other rows changed with row {case.row}")
        if not torch.equal(actual[name].isnan(), exact[name].isnan()):
            wrong.append(f"{name}: other elements are NaN than in float64")
    return wrong


def _other_rows(case: Case, result: torch.Tensor) -> tuple:
    """An index of all but the poisoned sequence: of (T, B, …), (D, B, …), or packed (N, …)."""
    if case.lengths is None or result.shape[:2] == (case.D, case.B):
        others = torch.arange(case.B) != case.row
        return slice(None), others
    assert case.offsets is not None
    mine = case.offsets[: case.lengths[case.row]] + case.row
    return (~torch.isin(torch.arange(result.shape[0]), mine),)
