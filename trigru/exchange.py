"""How the programs of a group hand tiles to each other: the data is the flag.

Every exchanged tensor is filled with a sentinel (all bits one) before the launch. The owner of an
element stores it once; a reader loads its tile until no element is the sentinel. There is no
barrier, no counter and nothing to reset between launches. Three rules make it right:

* `publish` never stores the sentinel. All bits one is a NaN, so a NaN is moved to another NaN.
* An element that a wait sees is whole, and the loads of a wait see each of them on its own. Of 32
  bits PTX's memory model says so; that the halves of an aligned word, stored one by one and loaded
  together, behave alike is how NVIDIA's GPUs work, not what the model says of mixed sizes.
* Every wait is bounded. A wait that runs out sets the error flag and goes on with the sentinel,
  which is a NaN, so a failed launch yields NaN, never plausible numbers; the host then raises.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_INTEGER = {2: torch.int16, 4: torch.int32}


def unwritten(*shape: int, H: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape, with `like`'s dtype and device, in which nothing has arrived yet but
    what nobody publishes: the padding of rows beyond their first H elements, which is 0."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    tensor.view(_INTEGER[tensor.itemsize]).fill_(-1)
    tensor[..., H:] = 0
    return tensor


@gluon.jit
def publish(ptrs, value, mask, FORM: gl.constexpr):
    """Store `value`, rounded to the stored type, so that none of it looks like the sentinel: as
    integers, of which a compiler cannot think what it likes about NaN, all ones become one less.
    Where nothing is exchanged, a plain store.

    FORM.PAIRS: a thread holds neighbours in memory (of 16 bits), two by two, and stores both at
    once, by the first one's mask: a second one beyond H is 0, as the padding there."""
    v = value.to(ptrs.dtype.element_ty)
    # The results of the assembly are there because it must have some; nobody reads them.
    if FORM.SOLO:
        gl.store(ptrs, v, mask=mask)
    elif FORM.BITS == 32:
        gl.inline_asm_elementwise(
            _publish_asm(FORM), "=r,l,r,r",
            [ptrs.to(gl.int64), v.to(gl.int32, bitcast=True), mask.to(gl.int32)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif FORM.PAIRS:
        gl.inline_asm_elementwise(
            _publish_asm(FORM), "=r,=r,l,l,r,r,r", [ptrs.to(gl.int64), v, mask.to(gl.int32)],
            dtype=gl.int32, is_pure=False, pack=2,
        )  # fmt: skip
    else:
        gl.inline_asm_elementwise(
            _publish_asm(FORM), "=r,l,h,r",
            [ptrs.to(gl.int64), v.to(gl.int16, bitcast=True), mask.to(gl.int32)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.constexpr_function
def _publish_asm(form):
    """PTX for one thread: store its element, or pair of them, where the mask is not 0."""
    if form.BITS == 32:
        out, ptr, mask, size = "mov.b32 $0, 0;", "$1", "$3", 32
        value = ".reg .b32 v; min.u32 v, $2, 0xFFFFFFFE;"
    elif form.PAIRS:
        out, ptr, mask, size = "mov.b32 $0, 0; mov.b32 $1, 0;", "$2", "$5", 32
        value = """.reg .b16 a, b; .reg .b32 v; mov.b32 {a, b}, $4;
            min.u16 a, a, 0xFFFE; min.u16 b, b, 0xFFFE; mov.b32 v, {a, b};"""
    else:
        out, ptr, mask, size = "mov.b32 $0, 0;", "$1", "$3", 16
        value = ".reg .b16 v; min.u16 v, $2, 0xFFFE;"
    test = f"setp.ne.b32 p, {mask}, 0;"
    if form.REPLICAS > 1:  # assembly runs in each of them, which a store of Triton's would not
        first = 32 * form.WARPS // form.REPLICAS
        test += f""" .reg .pred q; .reg .b32 t;
            mov.u32 t, %tid.x; setp.lt.u32 q, t, {first}; and.pred p, p, q;"""
    return f"""{{
        .reg .pred p; {value}
        {test}
        @p st.relaxed.gpu.global.b{size} [{ptr}], v;
        {out}
    }}"""


@gluon.jit
def wait(ptrs, limit, error_ptr, TILES: gl.constexpr, FORM: gl.constexpr):
    """A tuple of the exchanged tiles at ptrs, ptrs + TILE_STRIDE bytes and so on, once all that
    this thread holds of them has arrived.

    Each thread spins over its own 16-byte vectors, with no barrier: a vector is 8 (or 4) elements
    of the tile that are the thread's, in this order, and neighbours in memory. Which, and how far
    they are apart, `FORM` says. Bounded: after `limit` polls the error flag is set."""
    types: gl.constexpr = _repeated(ptrs.dtype.element_ty, TILES)
    return gl.inline_asm_elementwise(
        _wait_asm(0, TILES, False, FORM), _wait_constraints(TILES, False, FORM),
        [ptrs.to(gl.int64), limit, error_ptr.to(gl.int64)],
        dtype=types, is_pure=False, pack=FORM.VECTORS * 128 // FORM.BITS,
    )  # fmt: skip


@gluon.jit
def begin(ptrs, TILE: gl.constexpr, FORM: gl.constexpr):
    """Load tile number TILE as it is now, that is, have it under way: it has probably arrived."""
    return gl.inline_asm_elementwise(
        _loads_asm(TILE, 1, FORM), _loads_constraints(FORM), [ptrs.to(gl.int64)],
        dtype=ptrs.dtype.element_ty, is_pure=False, pack=FORM.VECTORS * 128 // FORM.BITS,
    )  # fmt: skip


@gluon.jit
def settle(tile, ptrs, limit, error_ptr, TILE: gl.constexpr, FORM: gl.constexpr):
    """What `begin` loaded, once all of it has arrived."""
    return gl.inline_asm_elementwise(
        _wait_asm(TILE, 1, True, FORM), _wait_constraints(1, True, FORM),
        [ptrs.to(gl.int64), limit, error_ptr.to(gl.int64), tile],
        dtype=ptrs.dtype.element_ty, is_pure=False, pack=FORM.VECTORS * 128 // FORM.BITS,
    )  # fmt: skip


@gluon.jit
def await_tiles(ptrs, limit, error_ptr, TILES: gl.constexpr, GATES: gl.constexpr,
                FORM: gl.constexpr):  # fmt: skip
    """What the products of so many gates take of an exchanged tensor: all of its tiles; or, where
    they go through stages in shared memory, the first, those that follow under way, and whence. A
    product of one gate alone hides less than a load takes: then two follow, else one."""
    if FORM.STAGES == 0:
        return wait(ptrs, limit, error_ptr, TILES, FORM)
    else:
        tile = wait(ptrs, limit, error_ptr, 1, FORM)
        begun = ()
        for t in gl.static_range(1, min(1 if GATES > 1 else 2, TILES - 1) + 1):
            begun = begun + (begin(ptrs, t, FORM),)
        return tile[0], begun, ptrs, limit, error_ptr


@gluon.constexpr_function
def _repeated(element, count):
    return [element] * count


@gluon.constexpr_function
def _loads_asm(first, tiles, form):
    """PTX for one thread: a load for each of its vectors of the tiles number `first` and on.

    Operands: the 4 words of each vector, out; then for each element of a tile its address (used of
    the first vector in each row; the others are constants away)."""
    lines = []
    for t in range(tiles):
        for v in range(form.VECTORS):
            in_row = v % form.PER_ROW
            address = 4 * tiles * form.VECTORS + 128 // form.BITS * (v - in_row)
            offset = (first + t) * form.TILE_STRIDE + in_row * form.VECTOR_STRIDE
            words = ", ".join(f"${4 * (t * form.VECTORS + v) + w}" for w in range(4))
            lines += [f"ld.relaxed.gpu.global.v4.b32 {{{words}}}, [${address}+{offset}];"]
    return "\n".join(lines)


@gluon.constexpr_function
def _arrived_asm(words, form):
    """PTX for one thread: set p if no element of these words, 4 or more, is the sentinel."""
    if form.BITS == 32:
        lines = [f"max.u32 a, {words[0]}, {words[1]};"]
        lines += [f"max.u32 a, a, {w};" for w in words[2:]]
        return [*lines, "setp.ne.u32 p, a, 0xFFFFFFFF;"]
    # Is any half word 0xFFFF? Each half on its own: its neighbour may not have arrived.
    # With u = ~w: some half of u is 0 <=> (u - 0x00010001) & ~u & 0x80008000 != 0.
    if form.NEWER:  # one test of the halves' maxima, made by two chains
        lines = [f"max.u16x2 a, {words[0]}, {words[1]};", f"max.u16x2 b, {words[2]}, {words[3]};"]
        for one, other in zip(words[4::2], words[5::2], strict=True):
            lines += [f"max.u16x2 a, a, {one};", f"max.u16x2 b, b, {other};"]
        lines += ["max.u16x2 a, a, b;", "sub.u32 b, 0xFFFEFFFE, a;", "and.b32 a, a, b;"]
    else:
        lines = [f"sub.u32 b, 0xFFFEFFFE, {words[0]};", f"and.b32 a, b, {words[0]};"]
        for w in words[1:]:
            lines += [f"sub.u32 b, 0xFFFEFFFE, {w};", f"lop3.b32 a, b, {w}, a, 0xEA;"]  # b&w|a
    return [*lines, "and.b32 a, a, 0x80008000;", "setp.eq.u32 p, a, 0;"]


@gluon.constexpr_function
def _wait_asm(first, tiles, begun, form):
    """PTX for one thread: load its vectors of the tiles until no element is the sentinel; if
    `begun`, begin with a look at what has been loaded before. Where they are many, which L2 takes
    longer for than the tests of each, only those are loaded again of which an element was one.

    Operands: as of the loads; for each element of a tile the limit, then the flag's address; the 4
    words of each vector that has been loaded."""
    outs, inputs = 4 * tiles * form.VECTORS, 128 // form.BITS * form.VECTORS
    words = [f"${k}" for k in range(outs)]
    limit, flag = f"${outs + inputs}", f"${outs + 2 * inputs}"
    loads = _loads_asm(first, tiles, form).splitlines()
    many = len(loads) >= 8 and not begun
    lines = ["{", ".reg .pred p;", ".reg .b32 a, b, i;", "mov.u32 i, 0;"]
    if begun:
        lines += [f"mov.b32 ${k}, ${outs + 3 * inputs + k};" for k in range(outs)]
        lines += ["bra TEST;"]
    lines += ["TRY:", *loads, "TEST:", *_arrived_asm(words, form), "@p bra DONE;"]
    # Every 64th time: has another wait run out? Then all that follow are short, too.
    lines += ["add.u32 i, i, 1;", "and.b32 a, i, 63;", "setp.eq.u32 p, a, 0;", "@p bra OTHERS;"]
    lines += ["MORE:", f"setp.ge.u32 p, i, {limit};", "@p bra NEVER;"]
    if many:
        for v, load in enumerate(loads):
            lines += [*_arrived_asm(words[4 * v : 4 * v + 4], form), f"@!p {load}"]
        lines += ["bra TEST;"]
    else:
        lines += ["bra TRY;"]
    lines += ["OTHERS:", f"ld.relaxed.sys.global.b32 b, [{flag}];"]
    lines += ["setp.eq.u32 p, b, 0;", "@p bra MORE;", "bra DONE;"]
    lines += ["NEVER:", "mov.b32 a, 1;", f"st.relaxed.sys.global.b32 [{flag}], a;", "DONE:", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _loads_constraints(form):
    return ",".join(["=r"] * (4 * form.VECTORS) + ["l"] * (128 // form.BITS * form.VECTORS))


@gluon.constexpr_function
def _wait_constraints(tiles, begun, form):
    outs, inputs = 4 * tiles * form.VECTORS, 128 // form.BITS * form.VECTORS
    early = ["=&r"] * outs  # written while inputs are still to be read
    return ",".join(
        [*early, *["l"] * inputs, *["r"] * inputs, *["l"] * inputs, *["r"] * (outs * begun)]
    )
