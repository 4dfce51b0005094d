"""How far chosen plans lie behind the best ones, and the file of what has been estimated."""

import csv
from dataclasses import replace

import pytest
import torch

from perf import __main__ as command
from perf import regret
from perf.compiling import TARGETS, Compiled
from perf.regret import CLOCKS_COLUMNS, COLUMNS, Estimates
from perf.sass import Estimate
from trigru.plan import candidates

BF16 = torch.bfloat16


@pytest.fixture
def asked(monkeypatch):
    """The plans that were compiled; clocks are the third power of the rows here."""
    plans = []

    def estimated(sm, plan, backward, textbook, dtype):
        plans.append(plan)
        step = Estimate(plan.rows**3.0, 1, 2, barriers=1, issued={"HMMA": 3}, spills=0, phases=[])
        return Compiled(b"", plan.shared_bytes, 99, ""), step

    monkeypatch.setattr(regret, "estimated", estimated)
    return plans


def of_256(B=4096):
    which = dict(D=1, itemsize=2, backward=False, textbook=False)
    return list(candidates(TARGETS[90], B=B, H=256, **which))


def test_what_is_in_the_file_is_not_estimated_again(tmp_path, asked):
    path = tmp_path / "clocks.csv"
    wide = of_256()[-1]
    first = Estimates(path).of(90, BF16, wide, False, False)
    again = Estimates(path)
    assert again.of(90, BF16, wide, False, False) == first and len(asked) == 1
    assert tuple(first) == CLOCKS_COLUMNS and float(first["clocks"]) == wide.BLOCK_B**3
    again.of(90, BF16, replace(wide, rows=wide.BLOCK_B // 2), False, False)  # taken as full
    assert len(asked) == 1
    again.of(90, BF16, replace(wide, rows=1), False, False)  # taken as a quarter full
    again.of(90, BF16, wide, True, False)
    again.of(90, BF16, wide, False, True)
    again.of(90, torch.float16, wide, False, False)
    assert len(asked) == 5 and asked[1].rows == wide.BLOCK_B // 4


def test_another_code_is_another_estimate(tmp_path, asked, monkeypatch):
    path = tmp_path / "clocks.csv"
    for code in ("a", "b"):
        monkeypatch.setattr(regret, "code_hash", lambda code=code: code)
        Estimates(path).of(90, BF16, of_256()[0], False, False)
    assert len(asked) == 2


def test_the_table(tmp_path, asked, monkeypatch, capsys):
    monkeypatch.setattr(regret, "HIDDEN", (256,))
    monkeypatch.setattr(regret, "BATCH", (1, 4096))
    path = tmp_path / "regret.csv"
    path.write_text("of before\n")
    assert command.main(["regret", "--out", str(path)]) == 0
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and tuple(rows[0]) == COLUMNS
    for row in rows:
        ratio = float(row["us_chosen"]) / float(row["us_best"])
        assert float(row["regret"]) == pytest.approx(ratio - 1, abs=0.01) and ratio >= 1
    # Such clocks make narrow tiles the best ones, which the plans do not know.
    large = [row for row in rows if row["B"] == "4096"]
    least = min(p.rounds(4096) * p.BLOCK_B**3 for p in of_256())
    assert float(large[0]["us_best"]) == pytest.approx(least / 1755, abs=0.001)
    assert any(float(row["regret"]) > 0 for row in large)
    assert "8 shapes, model, not measured: chosen plans are" in capsys.readouterr().out
