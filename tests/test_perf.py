"""The benchmarks' own code: what it times, what it refuses to time, what it writes and draws.
Nothing here depends on how long anything takes."""

import csv
import math
from pathlib import Path

import pytest
import torch

from perf import __main__ as command
from perf import train
from perf.measure import append_row, interleave, percentiles
from perf.plot import plot_csv
from perf.providers import Provider, build_torch, build_trigru, builders, textbook_loop
from perf.shapes import SETS, VARIANTS, Case
from perf.sweep import run_sweep
from trigru import TriGRU

CPU = torch.device("cpu")
TORCH = Case("torch", "fp32", T=5, B=3, I=4, H=6)
TEXTBOOK = TORCH._replace(variant="textbook")
COLUMNS = (
    "device,sm,driver,torch,triton,cudnn,commit,kernel_hash,date,provider,variant,mode,dtype,"
    "T,B,I,H,layers,directions,p20_us,p50_us,p80_us,us_per_step,floor_us,peak_bytes,max_rel_err,"
    "status"
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


def sweep(path, cases, build=None, clock=None):
    """The rows of a sweep, whose providers can be replaced by name; and whether TriGRU was ok."""

    def builders_of(variant, device):
        return builders(variant, device) | (build or {})

    clock = clock or FakeClock()
    good = run_sweep(cases, CPU, path, seconds=0, clock=clock, builders_of=builders_of)
    return read(path), good


def changed(change):
    """TriGRU's builder with its layer's output y replaced by change(y)."""

    def build(case, weights, training):
        layer, parameters = build_trigru(case, weights, training)

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


@pytest.mark.parametrize("seconds, rounds", [(0, 5), (2e-3, 10), (1, 20)])
def test_as_many_rounds_as_fit_into_the_seconds(seconds, rounds):
    def clock(calls):
        return [100.0] * len(calls)

    times = interleave({"a": int, "b": int}, clock, seconds, least=5, most=20)
    assert [len(t) for t in times.values()] == [rounds, rounds]


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
        layer, parameters = build_torch(case, weights, training)
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


def test_the_eager_loop_is_the_textbook_equation():
    x, h0 = torch.randn(1, 2, 3).double(), torch.randn(1, 2, 4).double()
    w_ih, w_hh, b = torch.randn(12, 3).double(), torch.randn(12, 4).double(), torch.randn(12)
    W_r, W_z, W_n = w_ih.split(4)
    U_r, U_z, U_n = w_hh.split(4)
    b_r, b_z, b_n = b.double().split(4)
    h = h0[0]
    r = torch.sigmoid(x[0] @ W_r.T + h @ U_r.T + b_r)
    z = torch.sigmoid(x[0] @ W_z.T + h @ U_z.T + b_z)
    n = torch.tanh(x[0] @ W_n.T + (r * h) @ U_n.T + b_n)
    y, h_n = textbook_loop(x, h0, w_ih, w_hh, b.double())
    torch.testing.assert_close(y[0], (1 - z) * h + z * n)
    assert torch.equal(h_n, y)


def test_the_sets_have_what_they_promise():
    smoke, core = (list(SETS[name]()) for name in ("smoke", "core"))
    assert {c.dtype for c in smoke} == {"fp32"} and max(c.T for c in smoke) <= 64
    assert len(core) == len(set(core)) == 2 * 3 * 8 * 7
    assert {(c.T, c.layers, c.directions) for c in core} == {(512, 1, 1)}
    assert all(c.I == c.H for c in core)


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


class WrongGradient(TriGRU):
    def forward(self, x, hx=None):
        y, h_n = super().forward(x, hx)
        return y + 2 * (y.detach() - y), h_n  # its sign


class Diverges(TriGRU):
    def forward(self, x, hx=None):
        y, h_n = super().forward(x, hx)
        return y * math.inf, h_n


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


# Plots


def pictures(folder):
    return sorted(p.name for p in folder.glob("*.png") if p.read_bytes()[:4] == b"\x89PNG")


def test_pictures_are_drawn_from_the_csv_alone(tiny, tmp_path):
    data, drawn = tmp_path / "data", tmp_path / "drawn"
    tiny(data)
    sweep(data / "sweep.csv", [TORCH, TORCH._replace(H=8)])
    assert pictures(data) == ["train.png"]
    csvs = [str(data / "train.csv"), str(data / "sweep.csv")]
    assert command.main(["plot", *csvs, "--out", str(drawn)]) == 0
    assert pictures(drawn) == [
        "sweep-speedup-torch-forward.png",
        "sweep-speedup-torch-training.png",
        "sweep-time-torch-forward.png",
        "sweep-time-torch-training.png",
        "train.png",
    ]


def test_a_sweep_with_failures_is_drawn(tmp_path):
    path = tmp_path / "sweep.csv"
    sweep(path, [TORCH, TORCH._replace(B=1)], {"trigru": changed(lambda y: 2 * y)})
    assert len(plot_csv(path)) == len(pictures(tmp_path)) == 4


def test_other_csv_files_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    append_row(path, ("a",), {"a": 1})
    with pytest.raises(ValueError, match="neither"):
        plot_csv(path)


# The command line


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
    assert len(pictures(tmp_path)) == 4
    with pytest.raises(SystemExit, match="no such shapes"):
        command.main([*arguments, "--dtype", "bf16"])


def test_options_count_before_the_command_and_after():
    for arguments in (["--out", "X", "train"], ["train", "--out", "X"], ["--out", "X"]):
        options = command.parser().parse_args(arguments)
        assert options.out == Path("X")
        assert options.device == ("cuda" if torch.cuda.is_available() else "cpu")
