"""The benchmarks' own code: what it times, what it refuses to time, what it writes and draws.
Nothing here depends on how long anything takes."""

import csv
import gc
import math
import sys
import types
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from layers import Diverges, WrongGradient

import perf.problem
import perf.sweep
from perf import __main__ as command
from perf import accuracy, ahead, kernels, measure, providers, train
from perf.measure import append_row, captured, facts, interleave, percentiles
from perf.problem import exact_results, make_call, make_problem
from perf.providers import (
    NoKernel,
    Provider,
    build_compiled,
    build_eager,
    build_flashrnn,
    build_torch,
    build_torchrl,
    build_trigru,
    builders,
    textbook_cell,
)
from perf.shapes import SETS, VARIANTS, Case, core, joined_by_peers, rounds
from perf.sweep import Bench, DeviceLost, not_measured, run_sweep
from trigru import TriGRU
from trigru.accuracy import relative_error

CPU = torch.device("cpu")
TORCH = Case("torch", "fp32", T=5, B=3, I=4, H=6)
TEXTBOOK = TORCH._replace(variant="textbook")
COLUMNS = (
    "device,sm,driver,torch,triton,cudnn,commit,kernel_hash,date,provider,variant,mode,dtype,"
    "T,B,I,H,layers,directions,packed,p20_us,p50_us,p80_us,us_per_step,host_us,floor_us,peak_bytes,"
    "max_rel_err,status"
)


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class FakeClock:
    """Runs the calls as the real clocks do; the n-th of all takes n µs."""

    def __init__(self):
        self.ran = 0

    def __call__(self, calls):
        times = []
        for call in calls:
            call()
            self.ran += 1
            times.append(float(self.ran))
        return times


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sweep(path, cases, build=None, clock=None, **more):
    """The rows of a sweep, whose providers can be replaced by name; and whether TriGRU was ok."""

    def builders_of(case, device):
        return builders(case, device) | (build or {})

    bench = Bench(CPU, 0, clock or FakeClock(), None, builders_of)._replace(**more)
    good = run_sweep(cases, path, bench)
    return read(path), good


def changed(change):
    """TriGRU's builder with its layer's output y replaced by change(y)."""

    def build(case, weights, training):
        layer, parameters, *_ = build_trigru(case, weights, training)

        def changed_layer(x, h0):
            y, h_n = layer(x, h0)
            return change(y), h_n

        return Provider(changed_layer, parameters)

    return build


# Measuring


def test_calls_run_in_turn_and_get_their_own_times():
    order, clock = [], FakeClock()
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(calls, clock, seconds=0, least=4)
    assert order == list("abc") * (3 + 4)
    assert times == {"a": [10, 13, 16, 19], "b": [11, 14, 17, 20], "c": [12, 15, 18, 21]}


@pytest.mark.parametrize(
    "us, seconds, warm_up, timed",
    [(100, 0, 3, 5), (100, 2e-3, 3, 10), (100, 1, 3, 20), (2e5, 0.05, 1, 3), (2e5, 4, 1, 10)],
)
def test_as_many_rounds_as_fit_into_the_seconds(us, seconds, warm_up, timed):
    ran = []

    def clock(calls):
        ran.extend(calls)
        return [float(us)] * len(calls)

    times = interleave({"a": int, "b": int}, clock, seconds, least=5, most=20)
    assert [len(t) for t in times.values()] == [timed, timed]
    assert len(ran) == 2 * (warm_up + timed)


class FakeCuda:
    """A device whose calls return at once, take their time, and hold a little more each time."""

    def __init__(self, monkeypatch):
        self.now, self.held, self.most, self.running = 0.0, 1000, 1000, False
        for name, value in {
            "synchronize": self.synchronize, "memory_allocated": lambda device: self.held,
            "max_memory_allocated": lambda device: self.most,
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.held),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def synchronize(self, device=None):
        self.now += 7.0 * self.running
        self.running = False

    def call(self, seconds, size):
        def call():
            assert not self.running, "the device is not idle"
            self.now, self.running = self.now + next(seconds), True
            self.most = max(self.most, self.held + size)

        return call


@pytest.mark.parametrize("seconds, us", [([3e-6, 1e-6, 9e-6, 2e-6, 5e-6], 3), ([0.06], 6e4)])
def test_the_host_is_timed_without_the_device(monkeypatch, seconds, us):
    """The median of five calls, or one that takes long."""
    cuda = FakeCuda(monkeypatch)
    cuda.most = 10**9  # of what ran before
    times = iter(seconds)
    found = measure.alone(cuda.call(times, 64), torch.device("cuda"))
    assert found == (pytest.approx(us), 64) and not list(times)
    assert measure.alone(cuda.call(times, 64), CPU) == (None, None)


def test_garbage_is_collected_once_a_shape(tmp_path, monkeypatch):
    """And not while something is timed or captured."""
    collected, enabled = [], []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))

    def clock(calls):
        enabled.append(gc.isenabled())
        return FakeClock()(calls)

    _, good = sweep(tmp_path / "sweep.csv", [TORCH, TEXTBOOK], clock=clock)
    assert good and len(collected) == 1 + 2 and not any(enabled)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_percentiles():
    assert percentiles([float(i) for i in range(100, -1, -1)]) == (20, 50, 80)
    assert percentiles([0.0, 10.0]) == (2, 5, 8)


def test_rows_are_appended_and_strange_columns_refused(tmp_path):
    path = tmp_path / "new" / "some.csv"
    append_row(path, ("a", "b"), {"a": 1, "b": None})
    append_row(path, ("a", "b"), {"b": "x, y", "a": 2})
    assert path.read_text() == 'a,b\n1,\n2,"x, y"\n'
    with pytest.raises(ValueError, match="columns"):
        append_row(path, ("a", "b"), {"a": 1})
    with pytest.raises(ValueError, match="columns"):
        append_row(path, ("a", "c"), {"a": 1, "c": 2})
    assert len(read(path)) == 2


def test_the_commit_of_a_copy_without_git(monkeypatch):
    monkeypatch.setenv("TRIGRU_COMMIT", "from the environment")
    answers = {"rev-parse": "0123456789ab", "status": " M forward.py"}
    monkeypatch.setattr(measure, "_output", lambda *command: answers[command[3]])
    assert facts(CPU)["commit"] == "0123456789ab+"
    answers["status"] = ""
    assert facts(CPU)["commit"] == "0123456789ab"
    answers["rev-parse"] = ""
    assert facts(CPU)["commit"] == "from the environment"


# Sweep


@pytest.mark.parametrize("case", [TORCH, TEXTBOOK], ids=VARIANTS)
def test_sweep_measures_both_modes_of_both_providers(tmp_path, case):
    rows, good = sweep(tmp_path / "sweep.csv", [case])
    assert good
    assert (tmp_path / "sweep.csv").read_text().splitlines()[0] == COLUMNS
    yardstick = "aten" if case.variant == "torch" else "eager"
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (mode, provider) for mode in ("forward", "training") for provider in (yardstick, "trigru")
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["max_rel_err"]) < 1e-5
        assert [row[k] for k in "TBIH"] == ["5", "3", "4", "6"]
        p20, p50, p80 = (float(row[f"p{p}_us"]) for p in (20, 50, 80))
        assert p20 < p50 < p80
        assert float(row["us_per_step"]) == p50 / 5
        assert row["floor_us"] == row["peak_bytes"] == row["cudnn"] == ""
        assert len(row["kernel_hash"]) == 12
    # After 3 rounds of warm-up, 5 rounds of two calls each: every second microsecond.
    assert [float(r["p50_us"]) for r in rows[:2]] == [11, 12]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda y: y * (1 + 1e-5), "wrong: y: relative error 1"),
        (lambda y: y + math.nan, "wrong: y: relative error inf"),
        (lambda y: y[:, :1], "wrong: y: relative error inf"),
        (lambda y: y.double(), "wrong: y is torch.float64, not torch.float32"),
    ],
    ids=["inexact", "nan", "shape", "dtype"],
)
def test_a_wrong_result_is_recorded_and_not_timed(tmp_path, change, says):
    clock = FakeClock()
    build = {"trigru": changed(change)}
    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], build, clock)
    assert not good
    yardstick, wrong = rows[:2]
    assert wrong["status"].startswith(says)
    assert wrong["p50_us"] == wrong["us_per_step"] == ""
    assert yardstick["status"] == "ok" and yardstick["p50_us"]
    timed = sum(bool(r["p50_us"]) for r in rows)
    assert clock.ran == timed * (3 + 5)


def test_a_wrong_gradient_is_found(tmp_path):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * (1 + 1e-5)

    rows, good = sweep(tmp_path / "sweep.csv", [TEXTBOOK], {"trigru": changed(Scaled.apply)})
    assert not good
    assert [r["status"][:11] for r in rows] == ["ok", "ok", "ok", "wrong: dx: "]


def test_an_exception_is_recorded_and_the_sweep_goes_on(tmp_path):
    def build(case, weights, training):
        if case.B == 3:
            raise torch.OutOfMemoryError("out of memory,\nsee the manual")
        return build_trigru(case, weights, training)

    cases = [TORCH, TORCH._replace(B=2)]
    rows, good = sweep(tmp_path / "sweep.csv", cases, {"trigru": build})
    assert not good
    said = [r["status"] for r in rows if r["provider"] == "trigru"]
    assert said == ["error: OutOfMemoryError: out of memory,"] * 2 + ["ok"] * 2
    assert all(r["status"] == "ok" and r["p50_us"] for r in rows if r["provider"] == "aten")


def test_an_exception_while_timed_is_recorded(tmp_path):
    def clock(calls):
        raise RuntimeError("the device is gone")

    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], clock=clock)
    assert not good
    assert {r["status"] for r in rows} == {"error while timed: RuntimeError: the device is gone"}


@pytest.mark.parametrize("useless", [False, True])
def test_nothing_is_timed_against_a_yardstick_that_failed(tmp_path, useless):
    def build(case, weights, training):
        if not useless:
            raise RuntimeError("no")
        layer, parameters, *_ = build_torch(case, weights, training)
        return Provider(lambda x, h0: tuple(-t for t in layer(x, h0)), parameters)

    clock = FakeClock()
    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], {"aten": build}, clock)
    assert not good and clock.ran == 0
    assert rows[0]["status"].startswith("wrong" if useless else "error: RuntimeError: no")
    assert rows[1]["status"].startswith("unchecked")


def test_a_killed_sweep_keeps_its_rows(tmp_path):
    def build(case, weights, training):
        if case.B == 2:
            raise KeyboardInterrupt
        return build_trigru(case, weights, training)

    path = tmp_path / "sweep.csv"
    with pytest.raises(KeyboardInterrupt):
        sweep(path, [TORCH, TORCH._replace(B=2)], {"trigru": build})
    assert [r["B"] for r in read(path)] == ["3"] * 4


def test_without_a_kernel_nothing_is_wrong(tmp_path):
    def build(case, weights, training):
        raise NoKernel("too large")

    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], {"trigru": build})
    assert good
    assert [r["status"] for r in rows if r["provider"] == "trigru"] == ["no kernel: too large"] * 2


class Graphs:
    """Stands in for CUDA graphs: each keeps nothing alive of what it reads, as theirs do."""

    def __init__(self, monkeypatch):
        self.replayed = 0
        graphs = self

        class Graph:
            def __init__(self):
                self.reads = graphs.read  # of all providers so far in this mode

            def replay(self):
                graphs.replayed += 1
                assert all(reference() is not None for reference in self.reads)

        class Nothing(nullcontext):
            def wait_stream(self, stream):
                pass

        self.read = []
        for name, value in {
            "CUDAGraph": Graph, "graph": lambda graph, stream: Nothing(), "Stream": Nothing,
            "current_stream": Nothing, "stream": nullcontext,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def reads(self, build):
        """A builder, called once for each mode, whose parameters the graphs read."""

        def built(case, weights, training):
            provider = build(case, weights, training)
            self.read = [] if build is build_torch else self.read
            self.read += [weakref.ref(parameter) for parameter in provider.parameters]
            return provider

        return built


def test_graphs_are_timed_and_keep_what_they_read(tmp_path, monkeypatch):
    graphs = Graphs(monkeypatch)
    build = {"aten": graphs.reads(build_torch), "trigru": graphs.reads(build_trigru)}
    rows, good = sweep(tmp_path / "sweep.csv", [TORCH._replace(H=9)], build, capture=captured)
    assert good and [r["status"] for r in rows] == ["ok"] * 4
    assert graphs.replayed == 4 * (3 + 5 + 1)  # to warm up, to be timed, to be judged


def test_what_was_timed_is_judged(tmp_path):
    """A graph could compute something else than the call that it was captured from."""

    def capture(call):
        return lambda: tuple(0.5 * t for t in call())

    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], capture=capture)
    assert not good and not any(r["p50_us"] for r in rows)
    assert all(r["status"].startswith("wrong: ") for r in rows)
    assert all(r["status"].endswith(", when timed") for r in rows)


def test_what_cannot_be_captured_is_timed_with_its_python(tmp_path):
    def build(case, weights, training):
        return build_trigru(case, weights, training)._replace(no_graph="it synchronises")

    captures = []

    def capture(call):
        captures.append(call)
        return call

    path = tmp_path / "sweep.csv"
    rows, good = sweep(path, [TORCH], {"trigru": build}, capture=capture)
    assert good and all(r["p50_us"] for r in rows) and len(captures) == 2  # nn.GRU's
    assert [r["status"] for r in rows] == ["ok", "ok: no graph: it synchronises"] * 2


def test_without_memory_for_a_graph_the_sweep_goes_on(tmp_path):
    def capture(call):
        raise torch.OutOfMemoryError("out of memory")

    rows, good = sweep(tmp_path / "sweep.csv", [TORCH, TEXTBOOK], capture=capture)
    assert good and len(rows) == 8 and all(r["p50_us"] for r in rows)
    assert {r["status"] for r in rows} == {"ok: no graph: OutOfMemoryError: out of memory"}


def test_a_failed_capture_ends_the_process_after_the_shape(tmp_path):
    def capture(call):
        raise RuntimeError("operation not permitted")

    path = tmp_path / "sweep.csv"
    with pytest.raises(DeviceLost, match="a capture failed in Case"):
        sweep(path, [TORCH, TEXTBOOK], capture=capture)
    rows = read(path)
    assert len(rows) == 4 and all(r["p50_us"] for r in rows)
    said = "ok: capture failed: RuntimeError: operation not permitted"
    assert {r["status"] for r in rows} == {said}


def test_a_failed_capture_ends_it_whatever_else_is_said(tmp_path):
    """Of the first call alone, which is cuDNN's that refused."""
    errors = [RuntimeError("operation not permitted")]

    def capture(call):
        if errors:
            raise errors.pop()
        return call

    with pytest.raises(DeviceLost, match="a capture failed"):
        sweep(tmp_path / "s.csv", [TORCH], {"aten": refusing(REFUSED)}, capture=capture)
    assert read(tmp_path / "s.csv")[0]["status"].startswith(f"{WITHOUT}; capture failed: ")


def test_floors_are_trigru_s_by_case_and_mode(tmp_path):
    def floor(case, mode):
        return 10.00049 * case.B if mode == "forward" else None

    rows, _ = sweep(tmp_path / "sweep.csv", [TORCH], floor=floor)
    assert [r["floor_us"] for r in rows] == ["", "30.001", "", ""]


def test_a_sweep_goes_on_where_its_file_ends(tmp_path):
    path, cases = tmp_path / "sweep.csv", [TORCH, TEXTBOOK, TORCH._replace(layers=2)]
    assert not_measured(cases, path, CPU) == cases
    sweep(path, cases[:2])
    assert not_measured(cases, path, CPU) == cases[2:]
    assert not_measured([*cases, TORCH._replace(dtype="bf16")], path, CPU)[1:]
    other_kernels = path.read_text().replace(facts(CPU)["kernel_hash"], "0123456789ab")
    path.write_text(other_kernels)
    assert not_measured(cases, path, CPU) == cases


def test_a_sweep_stops_in_time_between_two_shapes(tmp_path, capsys):
    times = iter([False, False, True])
    path, cases = tmp_path / "sweep.csv", [TORCH, TEXTBOOK, TORCH._replace(B=2)]
    bench = Bench(CPU, 0, FakeClock(), None)
    assert run_sweep(cases, path, bench, until=lambda: next(times))
    assert [r["variant"] for r in read(path)] == ["torch"] * 4 + ["textbook"] * 4
    assert "out of time: 1 of 3 shapes not measured" in capsys.readouterr().out


@pytest.mark.parametrize("lost, measured", [(True, 1), (False, 2)])
def test_a_lost_device_ends_the_process_after_the_shape(tmp_path, monkeypatch, lost, measured):
    path, cases = tmp_path / "sweep.csv", [TORCH, TEXTBOOK]
    monkeypatch.setattr(perf.sweep, "is_lost", lambda device: lost)
    bench = Bench(CPU, 0, FakeClock(), None)
    if lost:
        with pytest.raises(DeviceLost, match="variant='torch'"):
            run_sweep(cases, path, bench)
    else:
        run_sweep(cases, path, bench)
    assert len(read(path)) == 4 * measured


# cuDNN that refuses


def refusing(*errors):
    """nn.GRU as if cuDNN ran it, which raises these errors by turns."""
    left = list(errors)

    def build(case, weights, training):
        provider = build_torch(case, weights, training)

        def layer(x, h0):
            if torch._C._get_cudnn_enabled():
                left.append(left.pop(0))
                raise left[-1]
            return provider.layer(x, h0)

        return provider._replace(layer=layer, cudnn=True)

    return build


REFUSED = RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")
WITHOUT = "ok: without cuDNN: RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"


def test_what_cudnn_refuses_is_taken_without_it(tmp_path, monkeypatch):
    """In the exact results, in what is checked, captured and timed; and cuDNN is on again."""
    monkeypatch.setattr(perf.problem, "build_torch", refusing(REFUSED))
    captures = []

    def capture(call):
        captures.append(call)
        return call

    build = {"aten": refusing(REFUSED)}
    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], build, capture=capture)
    assert good and all(r["p50_us"] for r in rows) and len(captures) == 4
    assert [r["status"] for r in rows] == [WITHOUT, "ok"] * 2
    assert torch._C._get_cudnn_enabled()
    # Kernels one by one: of many steps no graph.
    monkeypatch.setattr(perf.sweep, "MOST_STEPS_IN_A_GRAPH", 9)
    rows, _ = sweep(tmp_path / "deep.csv", [TORCH._replace(layers=2)], build, capture=capture)
    said = f"{WITHOUT}; no graph: there are kernels for each of 10 steps"
    assert [r["status"] for r in rows] == [said, "ok"] * 2 and len(captures) == 4 + 2


@pytest.mark.parametrize(
    "error, says",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "error: OutOfMemoryError: CUDA out of me"),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            "error: RuntimeError: cuDNN error",
        ),
        (ValueError("no"), "error: ValueError: no"),
    ],
)
def test_what_is_no_refusal_of_cudnn_s_is_an_error(tmp_path, error, says):
    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], {"aten": refusing(error)})
    assert not good and all(r["status"].startswith(says) for r in rows[::2])


def test_others_are_not_taken_without_cudnn(tmp_path):
    def build(case, weights, training):
        return refusing(REFUSED)(case, weights, training)._replace(cudnn=False)

    rows, good = sweep(tmp_path / "sweep.csv", [TORCH], {"trigru": build})
    assert not good and rows[1]["status"].startswith("error: RuntimeError: cuDNN error")


def test_kernels_and_accuracy_say_what_cudnn_refused(tmp_path, monkeypatch):
    def builders_of(case, device):
        return {"cudnn": refusing(REFUSED), "trigru": build_trigru}

    assert accuracy.run_accuracy([TORCH], CPU, tmp_path / "accuracy.csv", builders_of)
    monkeypatch.setattr(kernels, "builders", builders_of)
    assert kernels.run_kernels([TORCH], CPU, tmp_path / "kernels.csv")
    for part in ("accuracy", "kernels"):
        said = {(r["provider"], r["status"]) for r in read(tmp_path / f"{part}.csv")}
        assert said == {("cudnn", WITHOUT), ("trigru", "ok")}


# Packed


PACKED = TORCH._replace(T=7, B=20, packed=True)


def test_lengths_of_a_packed_case():
    lengths = PACKED.lengths()
    assert lengths == sorted(lengths, reverse=True) == PACKED.lengths()
    assert (len(lengths), max(lengths), min(lengths)) == (20, 7, 1) and len(set(lengths)) > 4
    assert TORCH.lengths() == [5, 5, 5]
    problem = make_problem(PACKED, CPU)
    assert problem.x.shape == (sum(lengths), 4) and problem.dy.shape == (sum(lengths), 6)
    assert problem.batch_sizes.tolist() == [sum(n > t for n in lengths) for t in range(7)]


@pytest.mark.parametrize("layers, directions", [(1, 1), (2, 2)])
def test_packed_sequences_are_swept(tmp_path, layers, directions):
    """Right, and timed without a graph, which would not hold the lengths."""
    path, case = tmp_path / "sweep.csv", PACKED._replace(layers=layers, directions=directions)
    rows, good = sweep(path, [case], capture=lambda call: pytest.fail("captured"))
    assert good and all(r["p50_us"] and r["packed"] == "1" for r in rows)
    assert {r["status"] for r in rows} == {"ok: no graph: the lengths are on the host"}
    assert not_measured([case, case._replace(packed=False)], path, CPU) == [
        case._replace(packed=False)
    ]


def test_a_wrong_packed_result_is_found(tmp_path):
    def build(case, weights, training):
        layer, parameters, *_ = build_trigru(case, weights, training)

        def shifted(x, h0):
            y, h_n = layer(x, h0)
            return y._replace(data=y.data.roll(1, 0)), h_n

        return Provider(shifted, parameters)

    rows, good = sweep(tmp_path / "sweep.csv", [PACKED], {"trigru": build})
    assert not good and rows[1]["status"].startswith("wrong: y: ")


# Providers


def test_the_textbook_cell_is_the_textbook_equation():
    gx, h, w_hh = torch.randn(2, 12), torch.randn(2, 4), torch.randn(12, 4)
    gx_r, gx_z, gx_n = gx.split(4, dim=1)
    U_r, U_z, U_n = w_hh.split(4)
    r = torch.sigmoid(gx_r + h @ U_r.T)
    z = torch.sigmoid(gx_z + h @ U_z.T)
    n = torch.tanh(gx_n + (r * h) @ U_n.T)
    torch.testing.assert_close(textbook_cell(gx, h, w_hh), (1 - z) * h + z * n)


@pytest.mark.parametrize("layers, directions", [(1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loops_are_the_layers(variant, layers, directions):
    """nn.GRU and the loop agree, and so do the loop and TriGRU: layers, directions, gradients."""
    case = TORCH._replace(variant=variant, layers=layers, directions=directions)
    problem = make_problem(case, CPU)
    exact = exact_results(case, problem)
    for build in (build_eager, build_trigru, *[build_torch] * (variant == "torch")):
        results = make_call(build(case, problem.weights, True), problem, "training")()
        for (name, value), result in zip(exact.items(), results, strict=True):
            assert relative_error(result, value) < 1e-5, (build, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiled_loop_is_the_eager_one(variant, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(dynamic) or f)
    case = TORCH._replace(variant=variant)
    problem = make_problem(case, CPU)
    eager, fused = (
        make_call(build(case, problem.weights, True), problem, "training")()
        for build in (build_eager, build_compiled)
    )
    assert compiled == [False] and all(map(torch.equal, eager, fused))


def stand_in(monkeypatch, name, **names):
    """A module in the place of one that may not be installed."""
    module = types.ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


def assert_is_nn_gru(build):
    problem = make_problem(TORCH, CPU)
    exact = exact_results(TORCH, problem)
    results = make_call(build(TORCH, problem.weights, True), problem, "training")()
    for (name, value), result in zip(exact.items(), results, strict=True):
        assert relative_error(result, value) < 1e-5, name


def test_flashrnn_gets_its_gates_in_its_order(monkeypatch):
    """With a loop in its place, written from its documentation: Wx holds r, z, n; R n, r, z; b the
    n of the recurrent product, r, z, and the n of the input's."""

    def flashrnn(Wx, R, b, states, config):
        h, y = states[0, 0], []  # (B, heads, H)
        for gx in Wx:  # (B, 3, heads, H)
            gh_n, gh_r, gh_z = (torch.einsum("bnk,nhk->bnh", h, gate) for gate in R)
            r = torch.sigmoid(gx[:, 0] + gh_r + b[1])
            z = torch.sigmoid(gx[:, 1] + gh_z + b[2])
            n = torch.tanh(gx[:, 2] + b[3] + r * (gh_n + b[0]))
            h = (1 - z) * n + z * h
            y.append(h)
        return torch.stack(y)[None], h[None, None]

    stand_in(monkeypatch, "flashrnn", flashrnn=flashrnn, FlashRNNConfig=dict)
    assert_is_nn_gru(build_flashrnn)


def test_torchrl_gets_batches_first_in_float32(monkeypatch):
    def gru_triton(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype, input_precision):
        assert x.dtype == hidden.dtype == torch.float32 == compute_dtype and not is_init.any()
        assert hidden.shape == (3, 5, 6) and is_init.shape == (3, 5) and x.is_contiguous()
        h0, flags = hidden[:, 0][None], (True, 1, 0.0, True, False, True)
        y, h_n = torch.gru(x, h0, (w_ih, w_hh, b_ih, b_hh), *flags)
        return y, h_n[0]

    tuned = types.SimpleNamespace(cache={"for another batch size": None})
    stand_in(monkeypatch, "torchrl")
    stand_in(monkeypatch, "torchrl.modules")
    kernels = types.SimpleNamespace(
        gru_triton=gru_triton, _gru_fwd_kernel=tuned, _gru_bwd_kernel=tuned
    )
    stand_in(monkeypatch, "torchrl.modules.tensordict_module", _rnn_triton=kernels)
    assert_is_nn_gru(build_torchrl)
    assert not tuned.cache
    with pytest.raises(RuntimeError, match="beyond 256"):
        build_torchrl(TORCH._replace(H=257), {}, True)


def test_the_yardstick_comes_first(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: name == "torchrl" or None)
    many = next(c for c in core() if joined_by_peers(c))
    for case, device, names in (
        (TORCH, CPU, "aten trigru"),
        (TORCH, torch.device("cuda"), "cudnn trigru"),
        (TEXTBOOK, CPU, "eager trigru"),
        (many, torch.device("cuda"), "cudnn trigru eager torchrl compiled"),
        (many._replace(variant="textbook"), CPU, "eager trigru compiled"),
    ):
        assert " ".join(builders(case, device)) == names


def test_the_sets_have_what_they_promise():
    smoke, default = list(SETS["smoke"]()), SETS["default"]()
    assert {c.dtype for c in smoke} == {"fp32"} and max(c.T for c in smoke) <= 64
    assert all(c.I == c.H for c in core()) and len(core()) == len(set(core()))
    assert {c.H for c in core()} >= set(
        (64, 100, 128, 192, 224, 256, 384, 480, 512, 768, 1024, 2048)
    )
    # Early is what people run, whatever is cut off later, and a coarse picture of all.
    assert core()[: len(default)] == default and 100 <= len(default) <= 120
    run = {(c.B, c.T) for c in default if c.dtype == "bf16"}
    assert run >= {
        (4096, 24), (1024, 32), (128, 128), (16, 64), (128, 2000), (32, 1375), (1, 16384), (1, 1),
        (1056, 1000), (8, 2048),
    }  # fmt: skip
    shapes = {c[2:] for c in default}
    assert {(100, 256, 512, 512, 1, 1, True), (2000, 128, 384, 384, 3, 1, False)} < shapes
    assert (10000, 100, 128, 128, 2, 2, False) in shapes
    for variant, dtype, sizes in (
        ("torch", "bf16", (1, 16, 64, 256)),
        ("textbook", "bf16", (1, 64)),
        ("torch", "fp32", (1, 64)),
    ):
        plain = {(c.H, c.B) for c in default if c[:3] == (variant, dtype, 512)}
        assert plain >= {(H, B) for H in (64, 128, 256, 512, 1024, 2048) for B in sizes}
    # An eager loop is the yardstick of the textbook form, and knows no packed sequences.
    assert not any(c.packed or c.T > 2048 for c in core() if c.variant == "textbook")
    # What is compiled comes last, with few steps.
    compiled = [c for c in core() if joined_by_peers(c)]
    assert compiled == default[-2:] and {c.T for c in compiled} == {64}


def test_where_a_loss_is_likely_comes_early():
    """In every round: very many rows, few steps, a small H, an H between tiles."""
    for number in (0, 1, 2):
        places = [
            c for c in core() if rounds(c) == number and c.T < 8192 and not joined_by_peers(c)
        ]
        half = len(places) // 2
        for likely in (
            lambda c: c.B >= 1024, lambda c: c.T <= 32, lambda c: c.H <= 128, lambda c: c.H == 480,
        ):  # fmt: skip
            late = [c for c in places[half:] if likely(c)]
            assert len(late) < max(1, 0.1 * len(places)), number


# Training


@pytest.fixture
def tiny(monkeypatch):
    """`python -m perf train` of a few steps on a little text."""
    monkeypatch.setitem(train.SETTINGS, "cpu", train.Settings(30, T=8, B=4, H=8))
    monkeypatch.setattr(train, "EVALUATED", (4, 16))
    monkeypatch.setattr(train, "standard_library", lambda: b"It was the best of times. " * 200)
    return lambda folder: command.main(["train", "--device", "cpu", "--out", str(folder)])


def test_training_agrees_with_nn_gru(tiny, tmp_path, capsys):
    assert tiny(tmp_path) == 0
    says = capsys.readouterr().out
    assert "agrees with nn.GRU's" in says and "0.0000 apart over 30 steps" in says
    rows = read(tmp_path / "train.csv")
    losses = {run: [] for run in (train.YARDSTICK, train.TRIGRU, train.TEXTBOOK, train.CONTROL)}
    for row in rows:
        losses[row["run"]].append(float(row["train_bpc"]))
    assert losses[train.TRIGRU] == losses[train.YARDSTICK] != losses[train.TEXTBOOK]
    for curve in losses.values():
        assert len(curve) == 30 and curve[-1] < curve[0] and curve[0] == pytest.approx(8, abs=0.7)
    assert sum(bool(r["heldout_bpc"]) for r in rows if r["run"] == train.TRIGRU) == 10
    assert (tmp_path / "train.png").exists()


class IgnoresState(TriGRU):
    def forward(self, x, hx=None):
        return super().forward(x)


@pytest.mark.parametrize("broken", [IgnoresState, WrongGradient, Diverges])
def test_training_that_disagrees_exits_with_1(tiny, tmp_path, capsys, monkeypatch, broken):
    monkeypatch.setattr(train, "TriGRU", broken)
    assert tiny(tmp_path) == 1
    assert "DISAGREES" in capsys.readouterr().out
    assert (tmp_path / "train.png").exists()


def curves(drift, distance, steps=400):
    """Rows of a training whose losses are apart by functions of the step."""
    offsets = {train.YARDSTICK: lambda s: 0, train.CONTROL: drift, train.TRIGRU: distance}
    return [
        {"run": run, "step": s, "train_bpc": 3 + offset(s), "heldout_bpc": 3 if s % 100 else 3.1}
        for run, offset in offsets.items()
        for s in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    "drift, distance, agrees",
    [
        (lambda s: 0, lambda s: 0.0019, True),
        (lambda s: 0, lambda s: 0.0021, False),
        (lambda s: 0.01, lambda s: -0.029, True),
        (lambda s: 0.01, lambda s: -0.031, False),
        (lambda s: 0.1 * (s > 300), lambda s: 0.29 * (s > 300), True),
        (lambda s: 0.1 * (s > 300), lambda s: 0.01, False),  # too early
        (lambda s: 0, lambda s: 0.03 * (s == 200), True),  # one step is not a curve
        (lambda s: 0, lambda s: 0.01 * (s > 350), False),  # late, and not drift either
        (lambda s: 0, lambda s: math.nan if s > 350 else 0, False),
    ],
)
def test_curves_may_drift_apart_as_nn_gru_does_from_itself(drift, distance, agrees):
    assert train.verdict(curves(drift, distance))[0] is agrees


def test_held_out_losses_are_compared_too():
    rows = curves(lambda s: 0, lambda s: 0)
    next(r for r in rows if r["run"] == train.TRIGRU and r["step"] == 100)["heldout_bpc"] += 0.01
    assert not train.verdict(rows)[0]


def test_throughput_is_measured_by_the_clock(tmp_path):
    seconds = iter(range(1000))
    settings = train.Settings(3, T=8, B=4, H=8)
    text = bytes(range(256)) * 100
    rows = train.run_training(
        CPU, "fp32", settings, tmp_path / "t.csv", text=text, clock=lambda: next(seconds)
    )
    assert {r["tokens_per_s"] for r in rows} == {32}  # 8 · 4 in a second
    assert train.throughput(rows, train.TRIGRU) == (32, 32, 32)


def test_streams_are_the_text_in_pieces():
    assert train.streams(b"abcdefg", 2, CPU).T.tolist() == [list(b"abc"), list(b"def")]


@pytest.mark.parametrize(
    "processes, device, says",
    [
        (3, "cpu", "3 processes cannot share a batch of 4 rows equally"),
        (2, "cuda", "2 processes need as many GPUs, here are 1: start fewer, or take --device cpu"),
    ],
)
def test_processes_that_cannot_share_the_work(monkeypatch, processes, device, says):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun does")
    for name, number in (("RANK", 0), ("WORLD_SIZE", processes), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.setenv(name, str(number))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=says):
        train.join_processes(torch.device(device), rows=4)


# The command line


@pytest.mark.parametrize(
    "args", [[], ["sweep"], ["evidence"], ["plot"], ["train", "--task", "episodes"]], ids=str
)
def test_torchrun_is_for_training_alone(monkeypatch, args):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun does")
    with pytest.raises(SystemExit, match="only train is for torchrun"):
        command.main(args)


def test_no_command_runs_both_and_reports_either_failure(monkeypatch, tmp_path):
    ran = []
    for name in ("train", "sweep"):
        monkeypatch.setattr(
            command, name, lambda device, args, path: ran.append(path.name) or path.stem != "train"
        )
    assert command.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert ran == ["train.csv", "sweep.csv"]
    assert command.main(["sweep", "--device", "cpu"]) == 0


def test_sweep_command_measures_the_chosen_shapes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(SETS, "smoke", lambda: [TORCH, TEXTBOOK])
    arguments = ["sweep", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    assert command.main([*arguments, "--variant", "textbook"]) == 0
    assert "right in all" in capsys.readouterr().out
    assert {r["variant"] for r in read(tmp_path / "sweep.csv")} == {"textbook"}
    assert len(list(tmp_path.glob("sweep-*.png"))) == 3
    with pytest.raises(SystemExit, match="no such shapes"):
        command.main([*arguments, "--dtype", "bf16"])


@pytest.mark.parametrize("chosen, triton", [(None, True), ("core", True), (None, False)])
def test_a_sweep_on_a_gpu_compiles_first_and_ends_in_time(monkeypatch, tmp_path, chosen, triton):
    told, now = [], [1000.0]
    path = tmp_path / "sweep.csv"
    monkeypatch.setattr(ahead, "compile_ahead", lambda *args: told.append(args))
    monkeypatch.setattr(command, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(command, "make_bench", lambda device, seconds, floors: seconds)
    monkeypatch.setattr(command, "plot_csv", lambda path: [])
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def run_sweep(cases, path, seconds, until):
        assert told == [(cases, torch.device("cuda"))] * triton and seconds == 0.1
        now[0] += 200
        early = until()
        now[0] += 100
        assert (early, until()) == (False, chosen is None)
        told.append(cases)
        return True

    monkeypatch.setattr(command, "run_sweep", run_sweep)
    args = command.parser().parse_args(["sweep", *(["--set", chosen] if chosen else [])])
    assert command.sweep(torch.device("cuda"), args, path)
    assert told[-1] == SETS[chosen or "default"]()


def test_options_count_before_the_command_and_after():
    for arguments in (["--out", "X", "train"], ["train", "--out", "X"], ["--out", "X"]):
        options = command.parser().parse_args(arguments)
        assert options.out == Path("X")
        assert options.device == ("cuda" if torch.cuda.is_available() else "cpu")
