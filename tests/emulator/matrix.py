"""The cases that commands run: a wide matrix, and random ones."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product

from .cases import FORMS, Case

SIZES = {  # hidden sizes: all regimes in the library's plans, odd ones, one unit
    "bf16": (1, 7, 60, 64, 100, 128, 130, 200, 256, 512),
    "fp16": (7, 64, 100, 128, 200, 512),
    "tf32": (1, 60, 64, 130, 200, 256, 512),
    "ieee": (7, 64, 100, 200, 256),
}
BATCHES = ((5, 2), (16, 5), (17, 2), (1, 9), (40, 2), (1, 1), (64, 2))  # B, T
RAGGED = (7, 5, 5, 4, 2) + (1,) * 15
VARIANTS = (False, True)  # textbook
# One of each regime, whatever the library would choose for it.
SHAPES = (("latency", 200), ("solo", 60), ("throughput", 130), ("throughput wgmma", 130))


def can_have(sm: int, precision: str, form: str) -> bool:
    """Whether a device has what the form needs: wgmma is Hopper's, of 16 bits here."""
    return "wgmma" not in form or (sm == 90 and precision in ("bf16", "fp16"))


def matrix() -> Iterator[Case]:
    """As the library would plan each of them: all sizes, and all that a call can ask for."""
    cases = [*_sizes(), *_calls(), *_faults(), *_long()]
    return (replace(case, seed=i) for i, case in enumerate(cases))


def _sizes() -> Iterator[Case]:
    batches = cycle(BATCHES)
    for sm, (precision, sizes), textbook in product((90, 80), SIZES.items(), VARIANTS):
        for H, (B, T) in zip(sizes, batches, strict=False):
            yield Case(sm, precision, textbook, H, B, T)
    for textbook in VARIANTS:
        yield Case(90, "bf16", textbook, 1024, 16, 2)


def _calls() -> Iterator[Case]:
    for sm, precision, textbook in product((90, 80), ("bf16", "tf32"), VARIANTS):
        of = (sm, precision, textbook)
        for form, H in SHAPES:
            if not can_have(sm, precision, form):
                continue
            yield Case(*of, H, 20, 7, form=form, D=2, lengths=RAGGED, batch_programs=1)
            yield Case(*of, H, 20, 7, form=form, reverse=True, lengths=RAGGED)
            yield Case(*of, H, 40, 3, form=form, D=2, batch_programs=1)
            yield Case(*of, H, 5, 4, form=form, D=4, directions=1)
            yield Case(*of, H, 5, 4, form=form, reverse=True, bias=False)
            yield Case(*of, H, 5, 4, form=form, save=False)
            yield Case(*of, H, 5, 3, form=form, offset=1)
            yield Case(*of, H, 20, 7, form=form, resets="learned", scaled=True, clip=0.4)
            yield Case(*of, H, 20, 7, form=form, resets="zero", D=2, lengths=RAGGED)
            yield Case(*of, H, 5, 40, form=form, resets="zero", reverse=True, loss="y")
            yield Case(*of, H, 5, 3, form=form, D=4, heads=2, resets="learned", loss="h_n")
            if precision == "bf16":
                yield Case(*of, H, 5, 4, form=form, carried=True)
        for form in FORMS:
            if can_have(sm, precision, form):
                H = 60 if "solo" in form else 256
                yield Case(*of, H, 20, 3, form=form)
                yield Case(*of, H, 20, 3, form=form, resets="learned")


def _faults() -> Iterator[Case]:
    for sm, precision, textbook in product((90, 80), ("bf16", "fp16", "tf32"), VARIANTS):
        of = (sm, precision, textbook)
        for form, H in SHAPES:
            if not can_have(sm, precision, form):
                continue
            if form != "solo":
                yield Case(*of, H, 5, 4, form=form, missing=True)
            for where, poison in product(("gx", "h0"), ("nan", "inf")):
                yield Case(*of, H, 3, 4, form=form, poison=poison, where=where)


def _long() -> Iterator[Case]:
    """More steps than are counted at once, offsets of over 32 bits, many schedules."""
    yield Case(90, "bf16", False, 16, 18, 300, lengths=(300, 257, 256, 255) + (3,) * 14)
    yield Case(80, "fp16", True, 48, 3, 270, lengths=(270, 256, 1))
    for textbook, (form, H) in product(VARIANTS, SHAPES):
        for tile in (10**6, 10**8):
            yield Case(90, "bf16", textbook, H, 5, 3, form=form, far=tile)
        yield Case(90, "bf16", textbook, H, 17, 5, form=form, again=12)
        if can_have(80, "tf32", form):
            yield Case(80, "tf32", textbook, H, 5, 3, form=form, far=10**8)
            yield Case(80, "tf32", textbook, H, 5, 4, form=form, again=12)


def random_case(seed: int) -> Case:
    """One of all that the matrix holds, and more."""
    r = random.Random(seed)
    precision = r.choice(("bf16", "bf16", "fp16", "tf32", "ieee"))
    sm = r.choice((90, 90, 80, 86))
    form = r.choice(("", *(f for f in FORMS if can_have(sm, precision, f))))
    H = r.choice((r.randint(1, 64), r.randint(65, 128), r.randint(129, 300), r.randint(300, 600)))
    if form or precision == "ieee":
        H = min(H, 64 if "solo" in form and precision in ("tf32", "ieee") else 128)
    if form == "solo wgmma":
        H = max(H, 33)  # U of 64 rows
    case = Case(
        sm, precision, r.random() < 0.5, H, form=form, seed=seed,
        B=r.choice((1, 3, 16, 17, 31, 33, 50)), T=r.randint(1, 6),
        D=r.choice((1, 1, 1, 2, 2, 4)) if H <= 300 else 1, bias=r.random() < 0.8,
        save=r.random() < 0.9, batch_programs=r.choice((None, 1, 2)),
        offset=r.choice((0, 0, 0, 1, 4)),
    )  # fmt: skip
    return _more(case, r)


def _more(case: Case, r: random.Random) -> Case:
    if case.D > 1:
        case = replace(case, directions=r.choice((None, 1)))
    elif r.random() < 0.3:
        case = replace(case, reverse=True)
    elif case.T > 2 and case.B > 1 and case.save and r.random() < 0.4:
        return replace(case, poison=r.choice(("nan", "inf")), where=r.choice(("gx", "h0")))
    if r.random() < 0.35:
        steps = (r.choice((1, r.randint(1, case.T), case.T)) for _ in range(case.B))
        lengths = tuple(sorted(steps, reverse=True))
        case = replace(case, lengths=lengths, T=lengths[0])
    if r.random() < 0.5:
        case = replace(
            case, resets=r.choice(("", "zero", "learned")), scaled=r.random() < 0.3,
            carried=case.precision in ("bf16", "fp16") and r.random() < 0.3,
        )  # fmt: skip
        if case.save and r.random() < 0.5:
            case = replace(case, loss=r.choice(("y", "h_n")), clip=r.choice((None, 0.3)))
        if case.D == 1 and r.random() < 0.3:
            case = replace(case, T=r.choice((31, 32, 33, 66)), lengths=None)
    return case
