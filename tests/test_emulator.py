"""The emulator itself: what it refuses, what it leaves alone, and that it sees planted faults."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import triton
from emulator import Emulator, build, mutants, why_not
from emulator.cases import Case, plan_of, problem_of, run_kernels
from emulator.matrix import matrix, random_case
from emulator.ptx import compile_as_jit
from emulator.run import Buffer, run
from triton.backends.compiler import GPUTarget

from trigru import forward, launch

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

LATENCY = Case(90, "bf16", False, H=29, B=5, T=2, form="latency")
HEADER = """.visible .entry k(
.param .u64 a_ptr
)
{
.reg .b32 %r<9>;
.reg .b64 %rd<9>;
"""


def ptx(*lines):
    return HEADER + "".join(f"{line};\n" for line in lines) + "ret;\n}\n"


def test_an_unknown_instruction_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"k: line \d+: unknown instruction cp.async.bulk"):
        run(ptx("cp.async.bulk %r1, %r2"), "k", (1, 1, 1), 32, 0, [0], [], seed=0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("bar.sync 0, 64", "barriers of some warps only"),
        ("mov.b32 %r1, %r10", "unknown operand '%r10'"),
        ("ld.param.b64 %rd1, [b_ptr]", "no parameter b_ptr"),
        ("ld.local.b32 %r1, [%rd1]", "unknown instruction ld.local.b32"),
        ("bra THERE", "no label THERE"),
    ],
)
def test_what_is_not_emulated_is_refused(line, why):
    with pytest.raises(ValueError, match=why):
        run(ptx(line), "k", (1, 1, 1), 32, 0, [0], [], seed=0)


FIRST = ".reg .pred p;\nsetp.eq.u32 p, %r4, 0"
STORE, LOAD = "st.shared.b32 [1024], 1", "ld.shared.b32 %r3, [1024]"


def findings(*lines, threads=32, shared=64, programs=1, **how):
    """Of some schedules. Each thread has its number in %r1, four times it in %r2, and the address
    of its own word of 128 bytes in %rd3."""
    start = ("ld.param.b64 %rd1, [a_ptr]", "mov.u32 %r1, %tid.x", "mul.wide.u32 %rd2, %r1, 4")
    text = ptx(*start, "add.s64 %rd3, %rd1, %rd2", "shl.b32 %r2, %r1, 2", *lines)
    found = []
    for seed in range(8):
        memory = torch.zeros(32, dtype=torch.int32)
        buffer = Buffer(0x7F00_0000_0000, memory.data_ptr(), 128, "a_ptr", **how)
        grid, parameters = (programs, 1, 1), [buffer.address]
        found += run(text, "k", grid, threads, shared, parameters, [buffer], seed=seed).findings
    return "\n".join(found)


@pytest.mark.parametrize(
    ("lines", "how", "finding"),
    [
        (["st.global.b32 [%rd3], %r1"], {}, ""),
        (["st.global.b32 [%rd3+4], %r1"], {}, "memcheck: global access out of bounds"),
        (["st.global.b32 [%rd3+2], %r1"], {}, "memcheck: misaligned global"),
        (["ld.global.b32 %r3, [%rd3]"], {"initialised": False}, "initcheck: global"),
        (["st.global.b32 [%rd1], %r1"], {}, "racecheck: two threads store the same global"),
        (["st.global.b32 [%rd3], %r1"] * 2, {"once": True}, "protocol: an element is stored twice"),
        (["st.global.b32 [%rd3], -1"], {"sentinel_bytes": 4}, "protocol: the sentinel is stored"),
        (["mov.u32 %r4, %ctaid.x", FIRST, "@p st.relaxed.gpu.global.b32 [%rd1], 1",
          "@!p ld.global.b32 %r3, [%rd1]"], {"programs": 2}, "racecheck: weak load"),
        (["st.shared.b32 [%r2+1024], 1"], {"shared": 128}, ""),
        (["st.shared.b32 [%r2+1024], 1"], {}, "memcheck: shared access out of bounds"),
        ([LOAD], {}, "initcheck: shared"),
        (["st.shared.b32 [1024], %r1"], {}, "racecheck: lanes store different values"),
        (["mov.u32 %r4, %warpid", FIRST, f"@p {STORE}", f"@!p {LOAD}"], {"threads": 64},
         "racecheck: shared RAW"),
        ([STORE, "bar.sync 0", LOAD, STORE], {"threads": 64}, "racecheck: shared WAR"),
        ([STORE, "bar.sync 0", LOAD], {"threads": 64}, "note: shared WAW of equal values"),
        ([".reg .pred p", "setp.eq.u32 p, %r1, 3", "@p ret", "bar.sync 0"], {}, "synccheck"),
        ([".reg .pred p", "setp.lt.u32 p, %r1, 32", "@p bra END", "bar.sync 0", "END: trap"],
         {"threads": 64}, "trap"),
    ],
    ids=str,
)  # fmt: skip
def test_each_check_finds_its_fault(lines, how, finding):
    found = findings(*lines, **how)
    assert finding in found and bool(found) == bool(finding), found


@pytest.mark.parametrize("sign", ["s", "u"])
def test_a_conversion_takes_a_wide_register_s_lower_half(sign):
    """Each lane its own: in a wide register, whose lanes are twice as far apart, too."""
    memory = torch.zeros(32, dtype=torch.int64)
    buffer = Buffer(0x7F00_0000_0000, memory.data_ptr(), 256, "a_ptr")
    text = ptx(
        "ld.param.b64 %rd1, [a_ptr]", "mov.u32 %r1, %tid.x", "mul.wide.u32 %rd2, %r1, 8",
        "add.s64 %rd3, %rd1, %rd2", "sub.s32 %r2, %r1, 3", "cvt.u64.u32 %rd4, %r2",
        "shl.b64 %rd5, %rd2, 33", "or.b64 %rd4, %rd4, %rd5", f"cvt.{sign}64.{sign}32 %rd6, %rd4",
        "st.global.b64 [%rd3], %rd6",
    )  # fmt: skip
    result = run(text, "k", (1, 1, 1), 32, 0, [buffer.address], [buffer], seed=0)
    expected = torch.arange(32) - 3
    assert not result.findings
    assert memory.tolist() == (expected if sign == "s" else expected % 2**32).tolist()


HAND_OVER = """.reg .pred p;
ld.param.b64 %rd1, [a_ptr];
mov.u32 %r1, %ctaid.x;
setp.eq.u32 p, %r1, 1;
@p bra WAIT;
st.relaxed.gpu.global.b32 [%rd1], 7;
{raise_flag}
ret;
WAIT:
ld.acquire.gpu.global.b32 %r2, [%rd1+128];
setp.eq.u32 p, %r2, 0;
@p bra WAIT;
{load} %r3, [%rd1];
st.global.b32 [%rd1+256], %r3"""
RELAXED = "st.relaxed.gpu.global.b32 [%rd1+128], 1;"
RELEASED = "atom.global.gpu.release.add.u32 %r4, [%rd1+128], 1;"


@pytest.mark.parametrize(("raise_flag", "seen"), [(RELAXED, {0, 7}), (RELEASED, {7})])
@pytest.mark.parametrize("load", ["ld.relaxed.gpu.global.b32", "ld.global.b32"])
def test_a_store_is_seen_late_but_after_a_release(load, raise_flag, seen):
    """One program stores a value, then a flag; the other awaits the flag and stores the value that
    it sees then."""
    text, found = ptx(HAND_OVER.format(raise_flag=raise_flag, load=load)), set()
    for seed in range(40):
        memory = torch.zeros(96, dtype=torch.int32)
        buffer = Buffer(0x7F00_0000_0000, memory.data_ptr(), 384, "a_ptr")
        assert run(text, "k", (2, 1, 1), 32, 0, [buffer.address], [buffer], seed=seed).finished
        found.add(memory[64].item())
    assert found == seen


def test_the_ptx_is_what_triton_compiles(monkeypatch, tmp_path):
    """As far as PTX; and Triton's own cache and stages are left alone."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    calls = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append((args, kwargs))

    kernel = forward._gru_forward_kernel
    monkeypatch.setattr(forward, "_gru_forward_kernel", Recorded())
    inputs, _ = problem_of(LATENCY)
    forward.gru_forward(
        **inputs, offsets=None, textbook=False, reverse=False, bidirectional=False, save=True,
        plan=plan_of(LATENCY, backward=False),
    )  # fmt: skip
    ((args, kwargs),) = calls
    compiled, bound, passed = compile_as_jit(kernel, 90, args, kwargs)
    assert list(tmp_path.iterdir()) == []
    signature = {k: "constexpr" if k not in passed else signature_of(passed[k]) for k in bound}
    assert compiled.name == "_gru_forward_kernel" and len(signature) == len(bound)
    theirs = triton.compile(
        source_of(kernel, signature, bound, passed), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kwargs["num_warps"], **launch.compile_options()},
    )  # fmt: skip
    assert theirs.asm["ptx"] == compiled.text
    assert theirs.metadata.shared == compiled.shared_bytes


def signature_of(value):
    if isinstance(value, torch.Tensor):
        return {torch.bfloat16: "*bf16", torch.int32: "*i32"}[value.dtype]
    return "i64" if value > 2**31 else "i32"


def source_of(kernel, signature, bound, passed):
    constants = {k: v for k, v in bound.items() if k not in passed}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, parameter) in enumerate(zip(bound, kernel.params, strict=True))
        if isinstance(passed.get(name), torch.Tensor)
        and not parameter.do_not_specialize_on_alignment
    }
    make = triton.experimental.gluon._runtime.GluonASTSource if kernel.is_gluon() else None
    return (make or triton.compiler.ASTSource)(kernel, signature, constants, aligned)


def test_the_library_is_left_as_it_was():
    before = forward._gru_forward_kernel, launch.uses_tf32
    with pytest.raises(KeyError), Emulator():
        assert forward._gru_forward_kernel is not before[0]
        raise KeyError
    assert (forward._gru_forward_kernel, launch.uses_tf32) == before


def test_a_seed_is_a_schedule():
    """The same seed repeats it to the instruction, others do not; the numbers are the same."""
    inputs, cotangents = problem_of(LATENCY)
    runs = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        emulator = Emulator(seed=seed)
        results = run_kernels(LATENCY, inputs, cotangents, emulator)
        assert not emulator.faults
        runs[name] = results, [(r.instructions, r.barriers) for r in emulator.results]
    assert runs["first"][1] == runs["again"][1] != runs["other"][1]
    for name, tensor in runs["first"][0].items():
        assert torch.equal(tensor, runs["other"][0][name]), name


def test_without_a_compiler_the_reason_names_it(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert why_not() == "needs a C++ compiler: no-such-compiler is not there"
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        build.built()


def test_processes_may_build_at_once(tmp_path):
    """Each with an empty folder for what it builds: one result, and nothing else is left."""
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    (sources / "emulator.cpp").write_text("int answer() { return 42; }")
    code = (
        "import sys, pathlib, build;"
        "build.SOURCES, build.CACHE = map(pathlib.Path, sys.argv[1:]); print(build.built())"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parent)}
    command = [sys.executable, "-c", code, sources, cache]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    names = {process.communicate()[0].strip() for process in processes}
    assert {str(path) for path in cache.iterdir()} == names and len(names) == 1


@pytest.mark.parametrize(
    "name",
    [
        "canonical NaN: none, of 16 bits",
        "wait: leaves at once",
        "wait: gives up at once",
        "barriers: none",
        "fences: no proxy fence, throughput wgmma",
        "layouts: registers of A swapped",
        "masks: stores are not masked",
    ],
)
def test_planted_faults_are_found(name):
    """A few of those that `python -m tests.emulator mutants` plants."""
    (mutant,) = (m for m in mutants.PTX if m.name == name)
    assert mutants.is_caught(mutant)[0]


def test_a_mutation_that_changes_nothing_is_not_caught():
    unchanged = replace(mutants.PTX[0], mutate=lambda ptx: ptx, expected="")
    assert mutants.found_in(unchanged) == [mutants.DID_NOT_APPLY]
    assert not mutants.is_caught(replace(unchanged, expected="sentinel is stored"))[0]


def test_the_matrix_has_every_kind_of_case_and_random_ones_can_be_planned():
    cases = list(matrix())
    assert len(set(map(str, cases))) == len(cases) > 150
    for field in fields(Case):
        assert len({getattr(case, field.name) for case in cases}) > 1 or field.name == "row"
    for case in map(random_case, range(50)):
        plan_of(case, backward=False)
