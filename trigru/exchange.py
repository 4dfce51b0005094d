"""How the programs of a group hand tiles to each other: the data is the flag.

Every exchanged tensor is filled with a sentinel (all bits one) before the launch. The owner of an
element stores it once; a reader loads its tile and loads again whatever still is the sentinel.
There is no barrier, no counter and nothing to reset between launches. Two rules make it right:

* `publish` never stores the sentinel. All bits one is a NaN, so a NaN is moved to another NaN.
* Every wait is bounded. A wait that runs out sets the error flag and goes on with the sentinel,
  which is a NaN, so a failed launch yields NaN, never plausible numbers; the host then raises.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

_INTEGER = {2: torch.int16, 4: torch.int32}


def unwritten(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape, with `like`'s dtype and device, in which nothing has arrived yet."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    tensor.view(_INTEGER[tensor.itemsize]).fill_(-1)
    return tensor


@triton.jit
def deadline_from_now(limit, SPIN: tl.constexpr):
    """The clock at which waits give up; for the plain form (SPIN = 0), the number of polls."""
    if SPIN > 0:
        return globaltimer() + limit
    else:
        return limit


@triton.jit
def publish(ptrs, value, mask):
    """Store `value`, rounded to the stored type, so that none of it looks like the sentinel."""
    v = value.to(ptrs.dtype.element_ty)
    # On integer bits: a compiler may fold a float test for NaN, but never this.
    if v.dtype.primitive_bitwidth == 16:
        bits = v.to(tl.int16, bitcast=True)
    else:
        bits = v.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -1, bits & ~1, bits)
    tl.store(ptrs, bits.to(v.dtype, bitcast=True), mask=mask)


@triton.jit
def peek(ptrs, mask):
    """Load an exchanged tile as it is now. Masked elements read 0, which counts as arrived."""
    return tl.load(ptrs, mask=mask, other=0.0, volatile=True)


@triton.jit
def settle(tile, ptrs, mask, deadline, error_ptr, SPIN: tl.constexpr):
    """`tile` was peeked from `ptrs`; wait until all of it has arrived, and return it.

    SPIN: elements of the tile that one thread holds, a multiple of a 16-byte vector. Each thread
    then spins over its own vectors, with no barrier. 0: the plain form, for the interpreter."""
    if SPIN > 0:
        bits: tl.constexpr = tile.dtype.primitive_bitwidth
        vectors: tl.constexpr = SPIN * bits // 128
        tile = tl.inline_asm_elementwise(
            _spin_asm(vectors, bits),
            _spin_constraints(vectors, bits),
            [tile, ptrs.to(tl.int64), deadline, error_ptr.to(tl.int64)],
            dtype=tile.dtype,
            is_pure=False,
            pack=SPIN,
        )
    else:
        polls = 0
        pending = _missing(tile)
        while pending != 0:
            tile = peek(ptrs, mask)
            polls += 1
            if polls >= deadline:
                tl.store(error_ptr, 1)
            failed = tl.load(error_ptr, volatile=True)
            pending = tl.where(failed != 0, 0, _missing(tile))
    return tile


@triton.jit
def _missing(tile):
    """1 if any element of the tile is the sentinel, else 0."""
    if tile.dtype.primitive_bitwidth == 16:
        bits = tile.to(tl.int16, bitcast=True)
    else:
        bits = tile.to(tl.int32, bitcast=True)
    return tl.max(tl.ravel((bits == -1).to(tl.int32)), axis=0)


@triton.constexpr_function
def _spin_asm(vectors, bits):
    """PTX for one thread: wait for `vectors` 16-byte vectors of elements of 16 or 32 bits.

    Operands, in order: the 4 words of each vector out, the same in (as peeked), the address of
    each element, the deadline and the flag's address (once per element; the first is used)."""
    per_vector = 128 // bits
    elements = per_vector * vectors

    def out(v, word):
        return f"${4 * v + word}"

    def peeked(v, word):
        return f"${4 * vectors + 4 * v + word}"

    def address(v, element):
        return f"${8 * vectors + per_vector * v + element}"

    deadline, flag = f"${8 * vectors + elements}", f"${8 * vectors + 2 * elements}"
    lines = ["{", ".reg .pred any;", ".reg .b32 t, a;", ".reg .b64 d;"]
    lines += [f".reg .pred p{v};" for v in range(vectors)]
    for v in range(vectors):
        lines += [f"mov.b32 {out(v, w)}, {peeked(v, w)};" for w in range(4)]
    lines += ["TRY:"]
    for v in range(vectors):
        if bits == 16:
            # Is any half word 0xFFFF? Each half on its own: its neighbour may not have arrived.
            # With u = ~w: some half of u is 0 <=> (u - 0x00010001) & ~u & 0x80008000 != 0.
            lines += [f"sub.u32 t, 0xFFFEFFFE, {out(v, 0)};", f"and.b32 a, t, {out(v, 0)};"]
            for w in range(1, 4):
                lines += [f"sub.u32 t, 0xFFFEFFFE, {out(v, w)};"]
                lines += [f"lop3.b32 a, t, {out(v, w)}, a, 0xEA;"]  # (t & w) | a
            lines += ["and.b32 a, a, 0x80008000;", f"setp.ne.u32 p{v}, a, 0;"]
        else:
            lines += [f"max.u32 a, {out(v, 0)}, {out(v, 1)};"]
            lines += [f"max.u32 a, a, {out(v, w)};" for w in (2, 3)]
            lines += [f"setp.eq.u32 p{v}, a, 0xFFFFFFFF;"]
    lines += ["mov.pred any, p0;"]
    lines += [f"or.pred any, any, p{v};" for v in range(1, vectors)]
    lines += ["@!any bra DONE;"]
    for v in range(vectors):
        words = ", ".join(out(v, w) for w in range(4))
        lines += [f"@p{v} ld.relaxed.gpu.global.v4.b32 {{{words}}}, [{address(v, 0)}];"]
    lines += ["mov.u64 d, %globaltimer;", f"setp.lt.s64 any, d, {deadline};", "@any bra TRY;"]
    lines += ["mov.b32 a, 1;", f"st.relaxed.sys.global.b32 [{flag}], a;", "DONE:", "}"]
    return "\n".join(lines)


@triton.constexpr_function
def _spin_constraints(vectors, bits):
    words, elements = 4 * vectors, 128 // bits * vectors
    return ",".join(["=&r"] * words + ["r"] * words + ["l"] * (3 * elements))
