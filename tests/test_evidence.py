"""The parts of the evidence that a CPU can run, and how they are run one after another."""

import csv
import itertools
import os
import pickle
import re
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import compile_only
import pytest
import torch
import triton
from numerics import assert_within_rule

from perf import __main__ as command
from perf import accuracy, ahead, diagnose, evidence, kernels
from perf.compiling import TARGETS, NoDevice
from perf.measure import facts
from perf.providers import Provider, build_torch, build_trigru
from perf.shapes import Case, core, long_and_short, profiled
from perf.sweep import DeviceLost, make_bench, run_sweep
from trigru import launch, ops
from trigru.__main__ import computed
from trigru.accuracy import problem, yardsticks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = Case("torch", "fp32", T=5, B=3, I=4, H=6)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _a_machine_s_name(monkeypatch):
    """run_evidence says on what it runs, also where there is no device."""
    monkeypatch.setattr(evidence, "facts", lambda device: facts(CPU))


# Compiling ahead


@pytest.fixture
def sm_90(monkeypatch, tmp_path):
    """Triton compiles for a device that is not there, into a cache of the test's own."""

    for module, name in (
        (ahead.forward, "_gru_forward_kernel"),
        (ahead.backward, "_gru_backward_kernel"),
        (ahead.tiles, "_pack_resets_kernel"),
        (ahead.floor_kernels, "_exchange_kernel"),
    ):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, kernel)  # put back after the test
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    ahead.compile_only()


@pytest.mark.parametrize("variant", ["torch", "textbook"])
def test_what_is_compiled_ahead_is_what_is_launched(sm_90, tmp_path, variant):
    """Launches of other lengths and batches, in a process that has compiled nothing yet, find
    everything in the cache."""
    case = Case(variant, "bf16", T=512, B=64, I=256, H=256)
    found = list(ahead.kernels_of([case], TARGETS[90]))
    assert [(k.backward, k.save) for k in found] == [(False, False), (False, True), (True, False)]
    for kernel in found:
        ahead.compile_kernel(kernel, CPU)
    compiled = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert len(list(tmp_path.rglob("*.cubin"))) == 3
    assert compiled == {"_gru_forward_kernel", "_gru_backward_kernel"}
    for module in (ahead.forward._gru_forward_kernel, ahead.backward._gru_backward_kernel):
        module.kernel.device_caches.clear()
    for kernel in found:
        ahead.compile_kernel(kernel, CPU, T=7, B=33)
    assert len(list(tmp_path.rglob("*.cubin"))) == 3


def test_resets_are_packed_by_one_kernel(sm_90, tmp_path):
    """Whatever T and B, and wherever the mask begins in memory."""
    plan = ops.plan_launch(
        TARGETS[90], B=1, H=64, D=1, itemsize=2, backward=False, textbook=False
    )  # fmt: skip
    for T, B, begin in ((1, 1, 0), (33, 16, 0), (64, 7, 1)):
        mask = torch.zeros(T * B + begin, dtype=torch.bool)[begin:].view(T, B, 1)
        walk = {"HEADS": 1, "REVERSE": False, "BIDIRECTIONAL": False}
        launch.packed_resets(mask, None, B, replace(plan, rows=min(B, 8)), against=False, **walk)
    assert [path.stem for path in tmp_path.rglob("*.cubin")] == ["_pack_resets_kernel"]


def test_what_measures_floors_is_compiled_ahead(sm_90, tmp_path):
    case = Case("torch", "bf16", T=512, B=64, I=256, H=256)
    found = ahead.exchange_kernels([case, case._replace(T=7, B=49)], TARGETS[90])
    assert [barrier for _, barrier in found] == [False, True, False]  # backward has three slices
    for exchange, plan in found.items():
        ahead.compile_exchange(exchange, plan, CPU)
    assert len(list(tmp_path.rglob("*.cubin"))) == 3
    ahead.floor_kernels._exchange_kernel.kernel.device_caches.clear()
    for exchange, plan in ahead.exchanges([case], TARGETS[90]).items():
        tile = exchange.groups, exchange.rows, exchange.slices, exchange.H_pad
        y = torch.empty(9, *tile, dtype=torch.bfloat16)
        counts = torch.empty(exchange.groups, 32, dtype=torch.int32)
        ahead.floor_kernels.exchange_alone(y, counts, exchange, plan, False)
    assert len(list(tmp_path.rglob("*.cubin"))) == 3


def test_all_that_the_evidence_launches_is_compiled_in_one_pool(monkeypatch):
    """The tests first, in as many processes as there are, then the floors', then the sweep's."""
    pools = []

    def pool(jobs, device, set_up):
        pools.append([pickle.loads(pickle.dumps(job)).func.__name__ for job in jobs])
        return True

    monkeypatch.setattr(ahead, "device_limits", lambda device: TARGETS[90])
    monkeypatch.setattr(ahead, "run_on_all_cores", pool)
    monkeypatch.setattr(ahead, "workers", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert evidence.run_part("compile", CUDA, Path(), minutes=1)
    (jobs,) = pools
    names = [name for name, _ in itertools.groupby(jobs)]
    assert names == ["compile_tests", "compile_exchange", "compile_kernel"]
    everything, limits = [*core(), *long_and_short(True), *profiled()], TARGETS[90]
    assert jobs.count("compile_tests") == 3
    assert jobs.count("compile_exchange") == len(ahead.exchange_kernels(everything, limits))
    assert jobs.count("compile_kernel") == len(set(ahead.kernels_of(everything, limits)))


def test_inductor_leaves_triton_s_cache_where_it_is():
    """It moves the cache only where the environment does not say where it is."""
    code = "import os, perf, triton; print(os.environ['TRITON_CACHE_DIR'], triton.knobs.cache.dir)"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=evidence.ROOT, env=environment, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert len(said) == 2 and said[0] == said[1]


def test_kernels_of_all_shapes():
    found = list(ahead.kernels_of(core(), TARGETS[90]))
    assert {k.plan.H for k in found if k.dtype == "fp32"} == {c.H for c in core() if c.H <= 1024}
    assert {k.plan.H for k in found if k.dtype == "bf16"} == {c.H for c in core()}
    assert {k.plan.D for k in found} == {1, 2}
    assert {(k.textbook, k.backward, k.save) for k in found} == {
        (textbook, *kernel)
        for textbook in (False, True)
        for kernel in ((False, False), (False, True), (True, False))
    }


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_kernels_are_those_of_float32_s_products_there(monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    monkeypatch.setattr(ops, "device_limits", lambda device: TARGETS[90])
    case = Case("torch", "fp32", T=50, B=64, I=64, H=256)
    exact = launch.is_exact(torch.float32, CUDA)
    ops.plan_for.cache_clear()
    asked = [ops.plan_for(CUDA, 64, 256, 1, torch.float32, b, False, exact) for b in (False, True)]
    ops.plan_for.cache_clear()
    forward, saving, backward = (k.plan for k in ahead.kernels_of([case], TARGETS[90]))
    assert [forward, saving, backward] == [asked[0], asked[0], asked[1]]


def test_packed_kernels_are_compiled_ahead_for_packed_shapes(monkeypatch):
    packed = Case("torch", "bf16", T=50, B=20, I=64, H=64, packed=True)
    launched = []

    def launch(kernel, arguments, like, offsets, *_, **__):
        launched.append(offsets)

    for module in (ahead.forward, ahead.backward):
        monkeypatch.setattr(module, "launch", launch)
    for case in (packed, packed._replace(packed=False)):
        for kernel in ahead.kernels_of([case], TARGETS[90]):
            ahead.compile_kernel(kernel, CPU)
    assert [offsets is None for offsets in launched] == [False] * 3 + [True] * 3
    assert launched[0].tolist() == [0, 1] and launched[0].dtype == torch.int64


def works(device):
    assert device == CPU
    assert torch.backends.cudnn.rnn.fp32_precision == "ieee"  # as where the jobs come from


def breaks(device):
    raise RuntimeError("no registers left")


def dies(device):
    os._exit(1)


def set_up():
    torch.set_num_threads(1)


@pytest.mark.parametrize("job, says", [(breaks, "no registers left"), (dies, "BrokenProcessPool")])
def test_what_does_not_compile_is_told_once_and_ends_nothing(capsys, monkeypatch, job, says):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert not ahead.run_on_all_cores([works, job, job, works], CPU, set_up)
    assert capsys.readouterr().out.count(says) == 1
    assert ahead.run_on_all_cores([works] * 3, CPU, set_up)


def test_a_diagnosis_compiles_and_does_not_wait_long(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(launch, "WAIT_POLLS", launch.WAIT_POLLS)  # put back after the test
    monkeypatch.setattr(ahead, "compile_trials", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(diagnose, "run_diagnosis", lambda *arguments: done.append(arguments))
    evidence.run_part("diagnose", CPU, tmp_path, minutes=1)
    files = tmp_path / "diagnose.csv", tmp_path / "diagnose.pt"
    assert done == [(diagnose.trials(), CPU), (diagnose.trials(), CPU, *files)]
    assert launch.WAIT_POLLS == 6_000_000
    monkeypatch.setattr(diagnose, "statuses", lambda path: {"a trial": "began"})
    evidence.run_part("diagnose", CPU, tmp_path, minutes=1)
    assert len(done) == 3  # a process that goes on does not compile


@pytest.mark.parametrize("variant", ["torch", "textbook"])
def test_what_the_self_test_and_a_diagnosis_launch_is_compiled(
    sm_90, tmp_path, monkeypatch, variant
):
    """Both passes, and the reference's values in place of what the kernels would compute."""
    for launcher in (ahead.forward, "gru_forward"), (ahead.backward, "gru_backward"):
        monkeypatch.setattr(*launcher, getattr(*launcher))  # put back after the test
    monkeypatch.setattr(ops, "why_no_kernel", lambda *_: None)
    for module in (ops, diagnose):
        monkeypatch.setattr(module, "device_limits", lambda device: TARGETS[90])
    ops.plan_for.cache_clear()
    monkeypatch.setattr(ahead, "compile_only", lambda: None)  # that they are already
    ahead.compile_launches()
    textbook = variant == "textbook"
    ahead.compile_problem(textbook, torch.bfloat16, (3, 2, 1, 64), CPU)
    assert len(list(tmp_path.rglob("*.cubin"))) == 2
    for walk in diagnose.RESULTS:
        trial = diagnose.Trial(variant, "bf16", walk, "latency", H=144, directions=1, T=1, B=1)
        ahead.compile_trial(trial, CPU)
    assert len(list(tmp_path.rglob("*.cubin"))) == 4
    inputs, cotangents = problem(4, 3, 1, 144, textbook=textbook, dtype=torch.bfloat16)
    exact, yardstick = yardsticks(inputs, cotangents, textbook=textbook)
    assert_within_rule(computed(inputs, cotangents, textbook), exact, yardstick)
    assert len(list(tmp_path.rglob("*.cubin"))) == 4  # the same kernels
    ops.plan_for.cache_clear()


def test_gpu_tests_are_compiled_on_all_cores_before_they_run(tmp_path):
    """By a plain pytest, in processes that share the tests and do not do so in turn."""
    environment = os.environ | {
        "PYTEST_PLUGINS": "fake_gpu", "PYTHONPATH": "tests", "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/test_gpu.py", "-k", "test_reversed and 64"],
        cwd=ahead.ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "compiling what 2 tests launch" in done.stdout
    # Of both variants the forward kernel, as for training, and the backward one.
    said = re.findall(r"kernels (before|after): (\d+)", done.stdout)
    assert said == [("before", "4"), ("after", "4")]


def test_processes_share_the_tests_that_are_wanted(request, tmp_path):
    first, second = (compile_only.taken(list("abcde"), tmp_path) for _ in range(2))
    assert [next(first), next(second), next(second), next(first)] == list("abcd")
    assert [*second, *first] == ["e"]
    marks = {"plain": pytest.mark.gpu, "not so": pytest.mark.gpu(compiled_ahead=False)}
    for name, mark in marks.items():
        item = pytest.Function.from_parent(request.node.parent, name=name, callobj=lambda: None)
        assert not compile_only.wanted(item)
        item.add_marker(mark)
        assert compile_only.wanted(item) == (name == "plain")


def test_tests_that_crash_or_hang_end_their_own_process_alone(tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    head = "import os, time, pytest\npytestmark = pytest.mark.gpu\n"
    monkeypatch.setattr(ahead, "ROOT", tmp_path)

    def run(body, seconds):
        (tmp_path / "test_x.py").write_text(f"{head}def test_a():\n    {body}\n")
        ahead.compile_tests((), str(tmp_path), seconds, CPU)

    for fine in ("pass", "assert 0", "pytest.skip()"):
        run(fine, 60)
    with pytest.raises(RuntimeError, match="pytest ended with -9"):
        run("os.kill(os.getpid(), 9)", 60)
    with pytest.raises(subprocess.TimeoutExpired):
        run("time.sleep(60)", 1)


def test_nothing_is_compiled_on_a_cpu(monkeypatch):
    monkeypatch.setattr(ahead, "device_limits", lambda device: pytest.fail("asked for a device"))
    ahead.compile_ahead([CASE], CPU)


# Accuracy and kernels


def test_accuracy_of_every_result(tmp_path):
    path = tmp_path / "accuracy.csv"
    cases = [CASE, CASE._replace(variant="textbook", T=9)]
    assert accuracy.run_accuracy(cases, CPU, path)
    rows = read(path)
    results = ["y", "h_n", "dx", "dh0", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0"]
    assert [r["result"] for r in rows] == 2 * [*results, "dbias_hh_l0"] + 2 * results
    assert [r["provider"] for r in rows[::8][:2]] == ["aten", "trigru"]
    assert {(r["variant"], r["T"]) for r in rows} == {("torch", "5"), ("textbook", "9")}
    for row in rows:
        assert 0 <= float(row["rel_err"]) <= float(row["allowed"]) < 1e-5


def test_accuracy_without_numbers_is_not_good(tmp_path):
    """Neither where TriGRU and its yardstick are both NaN, nor where a provider fails; the cases
    that follow are measured."""
    path = tmp_path / "accuracy.csv"

    def nan(case, weights, training):
        layer, parameters, *_ = build_torch(case, weights, training)
        return Provider(lambda x, h0: (layer(x, h0)[0] * float("nan"), h0 * 1), parameters)

    assert not accuracy.run_accuracy([CASE], CPU, path, lambda *_: {"aten": nan, "trigru": nan})

    def fails(case, weights, training):
        if case.T == 5:
            raise RuntimeError("no memory")
        return build_trigru(case, weights, training)

    cases, builders = [CASE, CASE._replace(T=6)], {"aten": build_torch, "trigru": fails}
    before = len(read(path))
    assert not accuracy.run_accuracy(cases, CPU, path, lambda *_: builders)
    rows = read(path)[before:]
    assert {(r["provider"], r["T"]) for r in rows} == {
        ("aten", "5"),
        ("aten", "6"),
        ("trigru", "6"),
    }


@pytest.mark.parametrize("result", ["y", "dx"])
def test_an_error_beyond_the_rule_is_reported(tmp_path, result):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * (1 + 1e-5) if result == "y" else y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy if result == "y" else dy * (1 + 1e-5)

    def build(case, weights, training):
        layer, parameters, *_ = build_trigru(case, weights, training)

        def changed(x, h0):
            y, h_n = layer(x, h0)
            return Scaled.apply(y), h_n

        return Provider(changed, parameters)

    path = tmp_path / "accuracy.csv"
    providers = {"aten": build_torch, "trigru": build}
    assert not accuracy.run_accuracy([CASE], CPU, path, lambda *_: providers)
    over = [r for r in read(path) if float(r["rel_err"]) > float(r["allowed"])]
    assert result in {r["result"] for r in over} and {r["provider"] for r in over} == {"trigru"}


def test_kernels_that_each_provider_runs(tmp_path):
    path = tmp_path / "kernels.csv"
    assert kernels.run_kernels([CASE], CPU, path)
    rows = read(path)
    launched = {}
    for row in rows:
        launched.setdefault((row["mode"], row["provider"]), set()).add(row["kernel"])
        assert int(row["launches"]) >= 1 and float(row["us"]) >= 0
    assert list(launched) == [
        (mode, provider) for mode in ("forward", "training") for provider in ("aten", "trigru")
    ]
    for (mode, _), names in launched.items():
        assert "aten::gru" in names
        assert any("Backward" in name for name in names) == (mode == "training")


def test_a_profile_without_kernels_is_told(tmp_path, monkeypatch):
    class Empty(nullcontext):
        def key_averages(self):
            return []

    monkeypatch.setattr(kernels, "profile", lambda activities: Empty())
    monkeypatch.setattr(Empty, "__enter__", lambda self: self)
    assert not kernels.run_kernels([CASE], CPU, tmp_path / "kernels.csv")


def test_shapes_of_the_smaller_parts():
    cases = list(long_and_short(True))
    assert {c.T for c in cases} == {64, 512, 2048} and {c.dtype for c in cases} == set(
        ("bf16", "fp16", "fp32")
    )
    assert {c.H for c in profiled()} >= {128, 256}  # where cuDNN's persistent kernels end
    assert max(c.T * c.H for c in long_and_short(False)) <= 2**15


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(evidence.SETS, "smoke", lambda: [CASE, CASE._replace(B=2)])
    monkeypatch.setattr(evidence, "long_and_short", lambda on_cuda: [CASE])


# All parts


class Machine:
    """Runs no commands, but notes them and their limits; each takes its time of a fake clock."""

    def __init__(self, seconds=None, codes=None, grows=True):
        self.seconds, self.codes, self.grows = seconds or {}, codes or {}, grows
        self.now, self.ran = 1000.0, []

    def clock(self):
        return self.now

    def run(self, command, limit):
        part = command[command.index("--only") + 1]
        self.ran.append((part, limit, command))
        self.now += min(self.seconds.get(part, 1), limit)
        folder = Path(command[command.index("--out") + 1])
        if self.grows:
            with (folder / f"{part}.csv").open("a") as file:
                file.write("\n")
        codes = self.codes.get(part, [0])
        return codes.pop(0) if len(codes) > 1 else codes[0]


def run_all(machine, folder, device=CUDA, minutes=9.5):
    good = evidence.run_evidence(device, folder, minutes, machine.run, machine.clock)
    return good, [part for part, *_ in machine.ran]


ALL_IS_WELL = [part for part in evidence.PARTS if part != "diagnose"]


def test_all_parts_run_in_order(tmp_path, capsys):
    machine = Machine()
    assert run_all(machine, tmp_path / "new") == (True, ALL_IS_WELL)
    said = capsys.readouterr().out
    for part, _, command_line in machine.ran:
        assert command_line[:5] == [sys.executable, "-m", "perf", "evidence", "--only"]
        assert said.count(f"{part}: exit code 0 after 1 s\n") == 2  # at once, and all at the end
    assert "UNKNOWN" not in said or not facts(CPU)["commit"]
    assert run_all(Machine(), tmp_path, CPU)[1] == ["sweep", "kernels", "accuracy"]


def test_what_it_comes_to_is_told_last(tiny, tmp_path, capsys):
    evidence.run_part("sweep", CPU, tmp_path, minutes=1)
    run_all(Machine(), tmp_path)
    said = capsys.readouterr().out
    assert "The sweep has 4 measurements of TriGRU, a shape in one mode each: right in 4." in said
    assert "Speed relative to nn.GRU (ATen): torch variant, fp32, T = 5" in said


def test_an_unknown_commit_is_told(tmp_path, capsys, monkeypatch):
    here = facts(CPU) | {"device": "a toy", "commit": ""}
    monkeypatch.setattr(evidence, "facts", lambda device: here)
    run_all(Machine(), tmp_path)
    assert (
        capsys.readouterr().out.count("a toy, commit UNKNOWN: without git, set TRIGRU_COMMIT") == 2
    )


def test_the_sweep_has_the_time_that_the_others_leave(tmp_path):
    for seconds, left in (({"tests": 100, "floors": 50}, 570 - 152), ({}, 570 - 4)):
        machine = Machine(seconds)
        run_all(machine, tmp_path)
        (sweep,) = [(limit, c) for part, limit, c in machine.ran if part == "sweep"]
        minutes = float(sweep[1][sweep[1].index("--minutes") + 1])
        assert 60 * minutes == pytest.approx(left - evidence.AFTER_SWEEP - 30, abs=1)
        assert sweep[0] == pytest.approx(left - evidence.AFTER_SWEEP, abs=1)


@pytest.mark.parametrize("minutes", [9.5, 2])
def test_parts_that_hang_are_cut_off_in_time(tmp_path, minutes):
    machine = Machine({part: 1e9 for part in evidence.PARTS}, {"tests": [124]})
    good, ran = run_all(machine, tmp_path, minutes=minutes)
    assert not good and ran == ALL_IS_WELL
    assert machine.now - 1000 <= 60 * minutes + len(evidence.PARTS)


def test_tests_have_time_to_tell_what_failed(tmp_path):
    machine = Machine()
    run_all(machine, tmp_path)
    (tests,) = [(limit, c) for part, limit, c in machine.ran if part == "tests"]
    assert 60 * float(tests[1][-1]) == pytest.approx(tests[0] - evidence.GRACE, abs=1)


def test_a_part_that_fails_costs_the_others_nothing(tmp_path):
    for part in ALL_IS_WELL[1:]:
        good, ran = run_all(Machine(codes={part: [1]}), tmp_path)
        assert not good and ran == ALL_IS_WELL


EXPLAINED = ["self-test", *evidence.EXPLAINING]


@pytest.mark.parametrize("code", [1, evidence.FAILED, evidence.STOPPED, -11])
def test_a_self_test_that_fails_leaves_what_explains_it(tmp_path, capsys, code):
    good, ran = run_all(Machine(codes={"self-test": [code]}), tmp_path)
    assert not good and ran == EXPLAINED
    said = capsys.readouterr().out
    assert f"self-test: exit code {code}" in said and "no kernel has been tried alone" in said


def test_a_diagnosis_goes_on_without_the_kernel_that_took_its_process(tmp_path):
    codes = {"self-test": [1], "diagnose": [evidence.LOST, -11, evidence.WRONG]}
    machine = Machine({"diagnose": 20}, codes)
    good, ran = run_all(machine, tmp_path)
    assert not good and ran == ["self-test", *["diagnose"] * 3, "compile", "tests"]
    limits = [limit for part, limit, _ in machine.ran if part == "diagnose"]
    assert limits == [150, 130, 110]
    assert run_all(Machine({"diagnose": 60}, {**codes, "diagnose": [-11]}), tmp_path)[1] == [
        "self-test", *["diagnose"] * 3, "compile", "tests",
    ]  # fmt: skip


@pytest.mark.parametrize("passed", [True, False])
def test_the_self_test_is_the_library_s(tmp_path, monkeypatch, passed):
    compiled = []
    monkeypatch.setattr(ahead, "compile_self_test", compiled.append)
    monkeypatch.setattr(evidence, "trigru_main", lambda: 0 if passed else 1)
    assert evidence.run_part("self-test", CPU, tmp_path, minutes=1) == passed
    assert compiled == [CPU]


@pytest.mark.parametrize("code", [evidence.LOST, evidence.FAILED, -11])
def test_a_sweep_that_was_cut_short_goes_on_in_a_new_process(tmp_path, code):
    good, ran = run_all(Machine(codes={"sweep": [code, code, 0]}), tmp_path)
    assert not good and ran.count("sweep") == 3
    # Unless it gets nowhere, or the time is over.
    good, ran = run_all(Machine(codes={"sweep": [code]}, grows=False), tmp_path)
    assert not good and ran.count("sweep") == 1
    good, ran = run_all(Machine({"sweep": 150}, {"sweep": [code]}), tmp_path)
    assert not good and 1 < ran.count("sweep") < 5


def test_a_sweep_that_found_something_wrong_is_over(tmp_path):
    good, ran = run_all(Machine(codes={"sweep": [evidence.WRONG]}), tmp_path)
    assert not good and ran.count("sweep") == 1


def test_a_command_is_stopped_at_its_limit_with_all_that_it_started(tmp_path):
    log = tmp_path / "log.txt"
    says = "import sys; print(1); print(2, file=sys.stderr); sys.stdout.buffer.write(b'\\xff');"
    says += "sys.exit(7)"
    assert evidence.limited([sys.executable, "-c", says], 60, log) == 7
    started = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"""if True:
        import subprocess, sys, time
        with open({str(tmp_path / "pid")!r}, "w") as file:
            subprocess.run([sys.executable, "-c", {started!r}], stdout=file)
    """
    begin = time.monotonic()
    assert evidence.limited([sys.executable, "-c", code], 3, log) == evidence.STOPPED
    assert sorted(log.read_text().split()) == ["1", "2", "\N{REPLACEMENT CHARACTER}"]
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() < begin + 30:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":  # dead, though nobody has asked for its exit code
            break
        time.sleep(0.05)
    else:
        pytest.fail("what it started still runs")


def test_the_command_line_runs_all_or_one_part(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(command, "run_evidence", lambda *a: ran.append(a) or True)
    monkeypatch.setattr(command, "run_part", lambda *a: ran.append(a) or a[0] == "tests")
    arguments = ["evidence", "--device", "cpu", "--out", str(tmp_path / "new")]
    assert command.main([*arguments, "--minutes", "2"]) == 0
    assert command.main([*arguments, "--only", "tests"]) == 0
    assert command.main([*arguments, "--only", "sweep", "--minutes", "1"]) == 1
    folder = tmp_path / "new"
    assert folder.is_dir()
    assert ran == [(CPU, folder, 2), ("tests", CPU, folder, 9.5), ("sweep", CPU, folder, 1)]

    def lost(*_):
        raise DeviceLost("gone")

    monkeypatch.setattr(command, "run_part", lost)
    assert command.main([*arguments, "--only", "sweep"]) == evidence.LOST
    monkeypatch.setattr(command, "run_part", lambda *_: 1 // 0)
    assert command.main([*arguments, "--only", "sweep"]) == evidence.FAILED


@pytest.mark.parametrize("part", ["sweep", "kernels", "accuracy"])
def test_each_part_alone_writes_its_file(tiny, tmp_path, part):
    assert evidence.run_part(part, CPU, tmp_path, minutes=1)
    (written,) = tmp_path.iterdir()
    assert written.name == f"{part}.csv"
    rows = len(read(written))
    if part == "sweep":
        assert rows == 2 * 4
        assert evidence.run_part(part, CPU, tmp_path, minutes=1)
        assert len(read(written)) == rows  # there was nothing left


def test_a_sweep_without_time_measures_nothing(tiny, tmp_path):
    assert evidence.run_part("sweep", CPU, tmp_path, minutes=-1)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pytest_says(tmp_path, monkeypatch):
    """What the tests in a file are told to say: whether all is well, and the text."""
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    head = "import os, time, pytest\npytestmark = pytest.mark.gpu\n"

    def run(code, seconds=60.0):
        (tmp_path / "tests" / "test_x.py").write_text(head + code)
        good = evidence.run_tests(tmp_path / "tests.txt", time.monotonic() + seconds)
        return good, (tmp_path / "tests.txt").read_text()

    return run


@pytest.mark.parametrize("outcome", ["passed", "failed", "skipped"])
def test_what_pytest_says_is_kept(pytest_says, capsys, outcome):
    body = {"passed": "pass", "failed": "assert 0", "skipped": "pytest.skip('no device')"}
    good, said = pytest_says(f"def test_a(): {body[outcome]}\n")
    assert good == (outcome == "passed")  # without a device nothing is shown by skipping
    assert f"1 {outcome} in" in said.splitlines()[-1]
    assert said == capsys.readouterr().out


def test_the_evidence_s_tests_are_compiled_already(pytest_says):
    good, said = pytest_says(f"def test_a(): assert {evidence.COMPILED!r} in os.environ\n")
    assert good, said


@pytest.mark.parametrize(
    "end", [f"pytest.exit('lost', returncode={evidence.LOST})", "os.kill(os.getpid(), 9)"]
)
def test_tests_go_on_after_one_that_took_the_device_down(pytest_says, end):
    code = f"""
@pytest.mark.parametrize("x", ["(1, 2)-a", "b"])
def test_a(x): pass
def test_b(): {end}
def test_c(): pass
"""
    good, said = pytest_says(code)
    assert not good
    assert said.count("test_a[(1, 2)-a]") == said.count("test_c PASSED") == 1
    assert said.count("::test_b") == 1 + ("exit" in end and "test_b FAILED" in said)
    assert "1 passed" in said.splitlines()[-1]


def test_tests_that_hang_are_stopped_and_tell_what_failed(pytest_says):
    good, said = pytest_says("def test_a(): assert 1 == 2\ndef test_b(): time.sleep(60)\n", 5.0)
    assert not good and "E   assert 1 == 2" in said and "KeyboardInterrupt" in said


def test_nothing_but_the_bar_is_missing_without_tqdm(tmp_path):
    code = f"""if True:
        import sys
        sys.modules["tqdm"] = None
        import torch
        from perf import __main__, evidence
        from perf.progress import tqdm
        from perf.shapes import Case
        bar = tqdm(range(3), unit="step", desc="train", disable=False)
        assert list(bar) == [0, 1, 2]
        bar.set_postfix_str("bits", False)
        evidence.SETS["smoke"] = lambda: [Case("torch", "fp32", T=5, B=3, I=4, H=6)]
        sys.exit(__main__.main(["sweep", "--device", "cpu", "--seconds", "0.001",
                                "--out", {str(tmp_path)!r}]))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    assert (tmp_path / "sweep.csv").exists()


# On a GPU


@pytest.mark.gpu(compiled_ahead=False)
def test_a_sweep_on_a_gpu(tmp_path):
    """Graphs of every provider, with parameters in segments of their own, and all that is read off
    a device."""
    shapes = [
        Case("torch", "bf16", T=20, B=16, I=1024, H=1024, layers=2),
        Case("torch", "fp32", T=20, B=3, I=100, H=100, directions=2),
        Case("textbook", "bf16", T=20, B=16, I=1024, H=1024),
    ]
    packed = Case("torch", "bf16", T=20, B=16, I=256, H=256, packed=True)
    path, bench = tmp_path / "sweep.csv", make_bench(CUDA, 0.01)
    assert run_sweep([*shapes, packed], path, bench)
    rows = read(path)
    assert len(rows) == 16 and {r["status"] for r in rows if r["provider"] != "cudnn"} == {
        "ok", "ok: no graph: the lengths are on the host"
    }  # fmt: skip
    assert all(r["status"].startswith("ok") for r in rows)  # cuDNN may refuse an H
    measured = ("p50_us", "host_us", "peak_bytes")
    assert all(float(r[column]) > 0 for r in rows for column in measured)
    assert kernels.run_kernels(shapes[:1], CUDA, tmp_path / "kernels.csv")
    launched = {r["kernel"] for r in read(tmp_path / "kernels.csv") if r["provider"] == "trigru"}
    assert any("_gru_backward_kernel" in name for name in launched)
    assert accuracy.run_accuracy(shapes, CUDA, tmp_path / "accuracy.csv")
