"""The table of a model's clocks for devices that are not here."""

import pytest

from perf import __main__ as command
from perf import static
from perf.compiling import TARGETS
from perf.static import COLUMNS, DEVICES, KIND, Kernel


def test_the_table(tmp_path, monkeypatch, capsys):
    """Written anew, a row for each kernel, and what no plan fits is told."""
    few = [Kernel(90, "torch", False, 128, 300), Kernel(86, "torch", False, 4096, 16)]
    monkeypatch.setattr(static, "kernels", lambda: iter(few))
    path = tmp_path / "static.csv"
    path.write_text("of before\n")
    assert command.main(["static", "--out", str(path)]) == 0
    assert "no plan: U with hidden size 4096" in "".join(capsys.readouterr())
    with path.open(encoding="utf-8") as file:
        assert file.readline().startswith("kind,device,")
        assert file.readline().startswith(f'"{KIND}",H100')
        assert not file.read()


def test_a_kernel_that_the_model_cannot_follow_is_an_error(tmp_path, monkeypatch):
    def stuck(*args, **kwargs):
        raise RuntimeError("the simulation does not end")

    monkeypatch.setattr(static, "kernels", lambda: iter([Kernel(90, "torch", False, 128, 16)]))
    monkeypatch.setattr(static, "estimated", stuck)
    with pytest.raises(RuntimeError, match="does not end"):
        static.write_static(tmp_path / "static.csv")


def test_a_row():
    row = static.row_of(Kernel(120, "textbook", True, 256, 64))
    assert tuple(row) == COLUMNS
    assert row["kind"] == KIND == "model, not measured"
    assert (row["device"], row["clock_mhz"]) == (TARGETS[120].name, DEVICES[120].mhz)
    assert row["clocks_low"] <= row["clocks"] <= row["clocks_high"]
    us = row["rounds"] * row["clocks"] / row["clock_mhz"]
    assert float(row["us_per_step"]) == pytest.approx(us, rel=0.01)


def test_every_device_has_its_rows():
    rows = list(static.kernels())
    assert list(dict.fromkeys(k.sm for k in rows)) == [90, 80, 86, 120] == list(DEVICES)
    assert len(set(rows)) == len(rows) == (4 + 1) * 2 * (len(static.SHAPES) + 1)
