"""`python -m perf train --task stream`: the series, reading it in chunks, and the verdict."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from layers import Diverges, WrongGradient
from torch.testing import assert_close

from perf import __main__ as command
from perf import stream
from perf.evidence import FAILED
from perf.train import TRIGRU, YARDSTICK, Settings
from trigru import TriGRU

CPU, F64 = torch.device("cpu"), torch.float64
H = 8
# float64's sums in another order. The errors tried put forecasts off by 0.001 and more.
ROUNDING = {"rtol": 0, "atol": 1e-12}


pytestmark = pytest.mark.usefixtures("one_thread")


# The series


def test_every_day_has_its_length():
    lengths = stream.day_lengths()
    assert lengths.shape == (63 * 365 + 16,) and lengths[:2].tolist() == [1723.0, 1669.0]
    assert -2000 < lengths.min() and lengths.max() < 5000  # the longest were in 1972
    assert 100 < lengths.diff().std() < 200


def test_without_the_package_the_command_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "astropy_iers_data", None)  # as if it were not there
    arguments = ["train", "--task", "stream", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == FAILED
    assert "pip install astropy-iers-data, or pip install -e '.[stream]'" in capsys.readouterr().err


def test_days_that_are_missing(monkeypatch, tmp_path):
    import astropy_iers_data

    text = Path(astropy_iers_data.IERS_B_FILE).read_text("utf-8")
    (tmp_path / "short").write_text("".join(text.splitlines(keepends=True)[:1000]), "utf-8")
    monkeypatch.setattr(astropy_iers_data, "IERS_B_FILE", str(tmp_path / "short"))
    with pytest.raises(ValueError, match=r"short lacks 22\d\d\d of 23011 days"):
        stream.day_lengths()


def test_a_model_reads_today_and_is_asked_for_tomorrow():
    lengths = torch.tensor([1.0, 4.0, 2.0, 3.0, 9.0], dtype=F64)
    x, targets, unit = stream.prepared(lengths, 4)
    assert unit == lengths[:4].diff().std() == torch.tensor([3.0, -2.0, 1.0], dtype=F64).std()
    assert (x[:, 1] * unit).tolist() == pytest.approx([3, -2, 1])
    assert (targets * unit).tolist() == pytest.approx([-2, 1, 6])
    level = x[:, 0] * lengths[:4].std() + lengths[:4].mean()
    assert level.tolist() == pytest.approx([4, 2, 3])


def test_nothing_of_later_days_is_read():
    lengths = torch.randn(50, dtype=F64)
    before = stream.prepared(lengths, 40)
    lengths[40:] = 100.0  # beyond what is learnt from
    after = stream.prepared(lengths, 40)
    assert before[0][:39].equal(after[0][:39]) and before[1][:38].equal(after[1][:38])
    assert not (before[0][39:] == after[0][39:]).any() and before[2] == after[2]


# Whole and in chunks


class IgnoresState(TriGRU):
    def forward(self, x, hx=None):
        return super().forward(x)


class OldState(TriGRU):
    def forward(self, x, hx=None):
        y, h_n = super().forward(x, hx)
        return y, h_n if len(x) == 1 else y[-2:-1]


def readings(chunks, days=50):
    """What a TriGRU forecasts of one series, by the size of the chunks."""
    model = stream.Forecaster(stream.make_layers(H)[TRIGRU], H).to(F64)
    x = torch.randn(days, stream.INPUTS, dtype=F64)
    return model, x, {chunk: stream.read(model, x, chunk) for chunk in chunks}


def test_chunks_of_every_size_make_the_same_forecasts():
    model, x, forecasts = readings((1, 3, 25, 49, 50, 99))
    whole, h = model(x[:, None], None)
    assert h.shape == (1, 1, H)
    for forecast in forecasts.values():
        assert_close(forecast, whole[:, 0].detach(), **ROUNDING)
    twin = stream.like(model, H, F64)
    assert isinstance(twin.gru, torch.nn.GRU)
    assert_close(stream.read(twin, x, 50), forecasts[50], **ROUNDING)


@pytest.mark.parametrize("broken", [IgnoresState, OldState])
def test_errors_show_in_the_forecasts(monkeypatch, broken):
    monkeypatch.setattr(stream, "TriGRU", broken)
    _, _, forecasts = readings((5, 50))
    assert (forecasts[5] - forecasts[50]).abs().max() > 1e-3


def test_training_carries_the_state():
    run = stream.Run(stream.make_layers(H)[TRIGRU], H, CPU, F64)
    x, targets = torch.randn(12, 3, stream.INPUTS, dtype=F64), torch.randn(12, 3, dtype=F64)
    _, h = run.model(x[:8], None)
    run.step(x[:8], targets[:8])
    assert_close(run.h, h.detach(), **ROUNDING)
    forecasts, _ = run.model(x[8:], h)  # with the weights after the first step
    loss = (forecasts.float() - targets[8:]).square().mean()
    assert_close(run.step(x[8:], targets[8:]), loss.detach(), **ROUNDING)


# The command


@pytest.fixture
def tiny(monkeypatch):
    """`python -m perf train --task stream` of tides in 400 days."""
    days = torch.arange(400, dtype=F64)
    lengths = 300 * torch.sin(days * 2 * math.pi / 13.66) + 20 * torch.randn(400, dtype=F64)
    monkeypatch.setattr(stream, "day_lengths", lambda: lengths)
    monkeypatch.setattr(stream, "CHUNKS", (1, 30))
    monkeypatch.setitem(stream.SETTINGS, "cpu", Settings(40, T=16, B=4, H=H))

    def run(folder):
        return command.main(["train", "--task", "stream", "--device", "cpu", "--out", str(folder)])

    return run


def test_the_forecasts_are_good_and_the_same(tiny, tmp_path, capsys):
    assert tiny(tmp_path) == 0
    says = capsys.readouterr().out
    assert "Read 1, 30, 398 days at a time, TriGRU's forecasts agree" in says
    assert (tmp_path / "stream.png").exists()
    with (tmp_path / "stream.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["chunk"]) for r in rows] == [
        *[(run, "") for _ in range(40) for run in (YARDSTICK, TRIGRU)],
        *[(run, chunk) for run in (YARDSTICK, TRIGRU) for chunk in ("1", "30", "398")],
    ]
    for r in rows[-6:]:
        assert float(r["error"]) <= float(r["allowed_error"]) < 1e-5
        assert 15 < float(r["rms_us"]) < 0.8 * float(r["naive_us"])
    # On a CPU both are ATen's GRU.
    assert [r["rms_us"] for r in rows[0:80:2]] == [r["rms_us"] for r in rows[1:80:2]]


@pytest.mark.parametrize("broken", [IgnoresState, OldState, WrongGradient])
def test_errors_show_in_a_training(tiny, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(stream, "TriGRU", broken)
    rows = stream.run_training(CPU, "fp32", stream.SETTINGS["cpu"], tmp_path / "stream.csv")
    good, sentence = stream.verdict(rows)
    assert not good and "DISAGREE" in sentence


def test_forecasts_that_disagree_exit_with_1(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stream, "TriGRU", Diverges)
    assert tiny(tmp_path) == 1
    assert "DISAGREE" in capsys.readouterr().out
    assert (tmp_path / "stream.png").exists()


def rows_of(errors, ours, theirs, naive=100.0):
    """The rows of what was read in chunks of 1, 2, … days, errors in parts of those allowed."""
    return [
        {
            "run": run, "chunk": chunk, "error": error * 1e-6, "allowed_error": 1e-6,
            "rms_us": rms, "naive_us": naive,
        }
        for run, rms in ((YARDSTICK, theirs), (TRIGRU, ours))
        for chunk, error in enumerate(errors, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "errors, ours, theirs, good",
    [
        ((0.5, 1.0), 30.0, 30.1, True),
        ((0.5, 1.1), 30.0, 30.0, False),
        ((1.1, 0.5), 30.0, 30.0, False),
        ((math.inf, 0.5), 30.0, 30.0, False),
        ((math.nan, 0.5), 30.0, 30.0, False),
        ((0.5, 0.5), 30.3, 30.0, False),
        ((0.5, 0.5), 30.0, 30.3, False),
        ((0.5, 0.5), math.nan, 30.0, False),
        ((0.5, 0.5), 100.2, 100.1, False),  # no better than the naive ones
    ],
)
def test_the_verdict(errors, ours, theirs, good):
    assert stream.verdict(rows_of(errors, ours, theirs))[0] is good
