"""`perf.compare` over small files written here: what it calls faster, slower, wrong or the same."""

import csv
from pathlib import Path

import pytest

from perf.compare import compare, read_rows, report
from perf.sweep import COLUMNS

H100, H200 = "NVIDIA H100", "NVIDIA H200"


def row(p50=100.0, noise=1.0, **changes):
    """A row of TriGRU, its interval `noise` µs to both sides; without p50 not timed."""
    known = {
        "device": H100, "sm": "90", "driver": "570", "torch": "2.13.0", "triton": "3.6.0",
        "cudnn": "91002", "commit": "abc", "kernel_hash": "0123", "date": "2026-01-01T00:00:00Z",
        "provider": "trigru", "variant": "torch", "mode": "forward", "dtype": "bf16",
        "T": 512, "B": 16, "I": 64, "H": 64, "layers": 1, "directions": 1, "packed": 0,
        "us_per_step": "", "host_us": "", "floor_us": "", "peak_bytes": 1000, "max_rel_err": 0.001,
        "status": "ok",
    }  # fmt: skip
    times = dict.fromkeys(("p20_us", "p50_us", "p80_us"), "")
    if p50 is not None:
        times = {"p20_us": p50 - noise, "p50_us": p50, "p80_us": p50 + noise}
    return known | times | changes


def failed(status, **changes):
    return row(None, status=status, peak_bytes="", max_rel_err="", **changes)


def control(p50=100.0, provider="cudnn", **changes):
    return row(p50, provider=provider, **changes)


def write(path, rows, columns=COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def both(tmp_path):
    """Compare the rows of two files."""

    def run(a, b):
        return compare(write(tmp_path / "a.csv", a), write(tmp_path / "b.csv", b))

    return run


def section(text, start):
    """The lines of a report from the one that starts so to the next empty one."""
    found = [part for part in text.split("\n\n") if part.startswith(start)]
    assert len(found) <= 1
    return found[0].splitlines() if found else []


# Faster and slower


@pytest.mark.parametrize(
    "p50, faster, slower",
    [(97.9, 1, 0), (98, 0, 0), (100, 0, 0), (102, 0, 0), (102.1, 0, 1)],
)
def test_only_intervals_that_lie_apart_are_a_change(both, p50, faster, slower):
    c = both([row(100)], [row(p50)])
    says = f"TriGRU: {faster} faster, {slower} slower, {1 - faster - slower} the same"
    assert section(report(c), "TriGRU:")[0].startswith(says)
    assert bool(section(report(c), "TriGRU faster or slower")) == bool(faster + slower)
    assert c.good


def test_the_noise_of_both_sides_counts(both):
    for noises in ((30, 1), (1, 30)):
        a, b = (row(p50, noise) for p50, noise in zip((100, 120), noises, strict=True))
        assert "0 slower, 1 the same" in report(both([a], [b]))
    assert "1 slower, 0 the same" in report(both([row(100)], [row(120)]))


def test_changes_are_listed_from_the_worst_to_the_best_and_the_rest_is_counted(both):
    times = {8: 50, 16: 200, 32: 100, 64: 400, 128: 101}
    c = both([row(100, B=B) for B in times], [row(p50, B=B) for B, p50 in times.items()])
    title, _, *lines = section(report(c), "TriGRU faster or slower")
    assert "(3)" in title
    assert [[line.split()[i] for i in (0, 2, 3, 8)] for line in lines] == [
        ["0.250×", "100.0", "400.0", "64"],
        ["0.500×", "100.0", "200.0", "16"],
        ["2.000×", "100.0", "50.0", "8"],
    ]
    summary = section(report(c), "TriGRU:")
    assert summary[0].startswith("TriGRU: 1 faster, 2 slower, 2 the same within noise")
    mean = (2 * 0.5 * 0.25 / 1.01) ** (1 / 5)
    assert summary[0].endswith(f"geometric mean {mean:.3f}×")
    assert summary[1].startswith("worst 0.250×: torch forward bf16 T=512 B=64 I=64 H=64")
    assert summary[2].startswith("best  2.000×: torch forward bf16 T=512 B=8 I=64 H=64")
    assert report(c).endswith(summary[-1])


def test_the_worst_and_the_best_say_if_they_are_noise(both):
    summary = section(report(both([row(100)], [row(101)])), "TriGRU:")
    assert [" (within noise): " in line for line in summary] == [False, True, True]


def test_the_columns_are_aligned(both):
    c = both([row(1000, B=1), row(10, B=256)], [row(500, B=1), row(1000, B=256)])
    _, head, *lines = section(report(c), "TriGRU faster or slower")
    assert len({len(line) for line in (head, *lines)}) == 1
    assert [line.index("torch") for line in lines] == [head.index("variant")] * 2
    assert lines[0][: len("speed-up")] == "  0.010×"


def test_every_column_of_the_shape_tells_rows_apart(both):
    changes = {
        "provider": "cudnn", "variant": "textbook", "mode": "training", "dtype": "fp16",
        "T": 16, "B": 1, "I": 32, "H": 128, "layers": 2, "directions": 2, "packed": 1,
    }  # fmt: skip
    for column, value in changes.items():
        c = both([row()], [row(50, **{column: value})])
        assert (len(c.pairs), *map(len, c.only)) == (0, 1, 1), column
        assert report(c).endswith("TriGRU: no row has a time in both files.")


def test_the_last_of_rows_that_measure_the_same_counts(both):
    c = both([row(100), row(200)], [row(100), row(400), row(200)])
    assert "0 faster, 0 slower, 1 the same" in report(c)
    assert list(map(len, c.rows)) == [1, 1]
    assert not both([row()], [row(), failed("wrong: y")]).good
    assert both([row()], [failed("wrong: y"), row()]).good


# Statuses


@pytest.mark.parametrize("status", ["wrong: y: too far", "error: RuntimeError: no", "no kernel: H"])
def test_trigru_without_its_time_is_not_good_and_said_first_and_last(both, status):
    c = both([row(), row(100, B=1)], [failed(status), row(50, B=1)])
    assert not c.good
    text = report(c)
    _, _, line = section(text, "STATUS changed (1)")
    assert line.endswith(f"ok → {status}") and line.split()[0] == "trigru"
    assert text.index("STATUS") < text.index("TriGRU faster")
    assert section(text, "TriGRU LOST ITS TIME in 1 rows")[1].startswith("TriGRU: 1 faster")


def test_a_time_regained_is_good(both):
    c = both([failed("wrong: y: too far")], [row()])
    assert c.good
    assert section(report(c), "STATUS changed (1)")[2].endswith("wrong: y: too far → ok")
    assert "LOST" not in report(c)


def test_the_others_may_fail(both):
    c = both([row(), control()], [row(), failed("error: no", provider="cudnn")])
    assert c.good
    assert section(report(c), "STATUS changed (1)")[2].split()[0] == "cudnn"
    assert "LOST" not in report(c)


def test_a_remark_is_timed_and_its_change_is_listed(both):
    remark = "ok: no graph: RuntimeError"
    c = both([row()], [row(50, status=remark)])
    assert c.good and "1 faster" in report(c)
    assert section(report(c), "STATUS changed (1)")[2].endswith(f"ok → {remark}")


def test_timed_means_that_there_is_a_time(both):
    c = both([row()], [row(None, status="ok")])
    assert not c.good and "no row has a time" in report(c)
    assert section(report(c), "STATUS changed (1)")[2].endswith("ok → ok")


def test_failures_of_the_same_kind_are_no_change(both):
    wrong, other = "wrong: y: relative error 1.0", "wrong: y: relative error 1.1"
    assert not section(report(both([failed(wrong)], [failed(other)])), "STATUS")
    assert section(report(both([failed(wrong)], [failed("error: no")])), "STATUS")
    assert both([failed(wrong)], [failed("error: no")]).good


def test_statuses_are_listed_by_how_bad_they_are(both):
    a = [failed("wrong: y", B=1), row(B=2, status="ok: no graph"), control(B=3), row(B=4)]
    b = [row(B=1), row(B=2), failed("error: no", provider="cudnn", B=3), failed("error: no", B=4)]
    _, head, *lines = section(report(both(a, b)), "STATUS")
    at = head.split().index("B")
    assert [line.split()[at] for line in lines] == ["4", "3", "2", "1"]


# The control


def test_a_control_that_holds_still_raises_no_warning(both):
    c = both([row(), control(), control(B=1)], [row(50), control(100.5), control(99.5, B=1)])
    assert "WARNING" not in report(c)
    head, line = section(report(c), "control")
    assert head.split() == ["control", "rows", "faster", "slower", "same", "mean", "p20", "p80"]
    assert line.split()[:6] == ["cudnn", "2", "0", "0", "2", "1.000×"]


def test_the_spread_of_the_control_is_given(both):
    times = {1: 50, 2: 100, 4: 100, 8: 100, 16: 100, 32: 200}
    c = both([control(B=B) for B in times], [control(p50, B=B) for B, p50 in times.items()])
    line = section(report(c), "control")[1]
    assert line.split() == ["cudnn", "6", "1", "1", "4", "1.000×", "1.000×", "1.000×"]
    c = both([control(B=B) for B in (1, 2)], [control(100 / k, B=k) for k in (1, 2)])
    assert section(report(c), "control")[1].split()[5:] == ["1.414×", "1.200×", "1.800×"]


def test_rows_of_the_control_that_moved_are_said_in_words(both):
    a, b = [control(B=B) for B in (1, 2, 4)], [control(p, B=B) for B, p in ((1, 80), (2, 125))]
    text = report(both(a, [*b, control(100.5, B=4)]))
    assert "WARNING: 2 of 3 rows of cudnn moved beyond their noise, 0.800× to 1.250×" in text
    assert "as a whole" not in text


def test_a_control_that_moved_as_a_whole_is_said_in_words(both):
    a, b = ([control(100 * k, B=B) for B in (1, 2, 4, 8)] for k in (1, 1.01))
    text = report(both(a, b))
    assert "4 faster" not in text and "moved beyond their noise" not in text
    assert "WARNING: cudnn as a whole moved, 0.990×: a change of TriGRU of that size" in text


def test_one_row_within_its_noise_is_no_control_that_moved(both):
    assert "WARNING" not in report(both([control()], [control(101)]))


def test_each_provider_is_a_control_of_its_own(both):
    eager = {"provider": "eager", "variant": "textbook"}
    text = report(both([control(), row(**eager)], [control(50), row(200, **eager)]))
    assert [line.split()[0] for line in section(text, "control")[1:3]] == ["cudnn", "eager"]
    assert "1 of 1 rows of cudnn moved beyond their noise, 2.000×" in text
    assert "1 of 1 rows of eager moved beyond their noise, 0.500×" in text


def test_a_comparison_without_a_control_says_so(both):
    text = report(both([row(), control(B=1)], [row(), failed("error: no", provider="cudnn", B=1)]))
    assert "WARNING: no control" in text


def test_a_change_stands_beside_that_of_the_others_at_the_same_shape(both):
    training = {"mode": "training"}
    a = [row(B=1), control(B=1), control(B=1, provider="eager")]
    a += [row(B=2), control(B=2), row(B=2, **training), control(B=2, **training), row(B=4)]
    b = [row(80, B=1), control(50, B=1), control(12.5, B=1, provider="eager")]
    b += [row(50, B=2), control(80, B=2), row(40, B=2, **training), control(25, B=2, **training)]
    b += [row(20, B=4)]
    _, _, *lines = section(report(both(a, b)), "TriGRU faster or slower")
    assert [line.split()[:2] for line in lines] == [
        ["1.250×", "4.000×"],  # of 2 and 8
        ["2.000×", "1.250×"],
        ["2.500×", "4.000×"],
        ["5.000×", "-"],
    ]


# Memory and errors


@pytest.mark.parametrize(
    "b, ratio", [(1010, None), (1011, "1.011×"), (991, None), (990, "0.990×"), ("", None)]
)
def test_memory_beyond_a_hundredth_is_listed(both, b, ratio):
    c = both([row()], [row(peak_bytes=b)])
    lines = section(report(c), "Peak bytes")[2:]
    assert [line.split()[0] for line in lines] == ([ratio] if ratio else [])
    assert c.good


@pytest.mark.parametrize(
    "b, ratio", [(0.002, None), (0.0021, "2.100×"), (0.0005, None), (0.0004, "0.400×")]
)
def test_errors_beyond_twice_are_listed(both, b, ratio):
    lines = section(report(both([row()], [row(max_rel_err=b)])), "The largest error")[2:]
    assert [line.split()[0] for line in lines] == ([ratio] if ratio else [])


def test_an_error_may_start_at_zero_or_end_at_infinity(both):
    a = [row(max_rel_err=e, B=B) for B, e in ((1, 0), (2, 0), (4, 1), (8, "inf"))]
    b = [row(max_rel_err=e, B=B) for B, e in ((1, 0), (2, 1e-9), (4, "inf"), (8, "inf"))]
    title, _, *lines = section(report(both(a, b)), "The largest error")
    assert "(2)" in title
    assert [line.split()[:3] for line in lines] == [
        ["inf×", "0.00e+00", "1.00e-09"],
        ["inf×", "1.00e+00", "inf"],
    ]


def test_the_largest_increase_comes_first_and_a_failed_row_counts_too(both):
    a = [row(B=1), row(B=2), row(None, status="wrong: y", B=4)]
    b = [row(B=1, peak_bytes=2000), row(B=2, peak_bytes=500), row(B=4, peak_bytes=3000)]
    title, _, *lines = section(report(both(a, b)), "Peak bytes")
    assert "(3)" in title
    assert [line.split()[:3] for line in lines] == [
        ["3.000×", "1,000", "3,000"],
        ["2.000×", "1,000", "2,000"],
        ["0.500×", "1,000", "500"],
    ]


# What cannot be compared


def test_rows_of_one_file_are_counted_with_their_shapes(both):
    a = [row(B=B, H=H) for B in (1, 2) for H in (64, 128)] + [control(B=1), row(dtype="fp16")]
    b = [row(B=1), row(T=16, mode="training")]
    c = both(a, b)
    title, head, *lines = section(report(c), "Only in one file")
    assert title == "Only in one file (5 rows of A, 1 rows of B):"
    assert head.split()[:3] == ["file", "rows", "provider"]
    assert [" ".join(line.split()) for line in lines] == [
        "A 4 cudnn,trigru torch forward bf16 512 1,2 64 64,128 1 1 0",
        "A 1 trigru torch forward fp16 512 16 64 64 1 1 0",
        "B 1 trigru torch training bf16 16 16 64 64 1 1 0",
    ]
    assert c.good
    assert not section(report(both(a, a)), "Only")


def test_the_header_has_both_runs(both):
    a = [row(commit="old", kernel_hash="1111", cudnn="")]
    a += [row(commit="older", B=1, date="2026-01-02", cudnn="")]
    text = report(both(a, [row(commit="new", kernel_hash="2222", date="2026-01-03", cudnn="")]))
    head = text.split("\n\n")[0].splitlines()
    at = head[0].index("A"), head[0].index("B")
    known = {line.split()[0]: (line[at[0] : at[1]].strip(), line[at[1] :]) for line in head[1:]}
    assert [Path(name).name for name in known.pop("file")] == ["a.csv", "b.csv"]
    assert known == {
        "device": (H100, H100),
        "sm": ("90", "90"),
        "driver": ("570", "570"),
        "torch": ("2.13.0", "2.13.0"),
        "triton": ("3.6.0", "3.6.0"),
        "commit": ("old, older", "new"),
        "kernel_hash": ("1111, 0123", "2222"),
        "date": ("2026-01-02", "2026-01-03"),
    }  # without cuDNN, as on a CPU


@pytest.mark.parametrize("fact", ["driver", "torch", "triton", "cudnn"])
def test_other_versions_are_warned_of(both, fact):
    text = report(both([row(), control()], [row(), control(**{fact: "new"})]))
    assert f"WARNING: {fact} differ" in text


def test_rows_of_different_devices_are_not_compared(both):
    c = both([row(), control()], [row(200, device=H200), failed("wrong: y", device=H200, B=1)])
    text = report(c)
    assert "WARNING: the devices differ" in text
    assert not c.pairs and c.good
    _, head, *lines = section(text, "Only in one file (2 rows of A, 2 rows of B)")
    assert head.split()[2] == "device"
    assert [line.split()[:4] for line in lines] == [
        ["A", "2", "NVIDIA", "H100"],
        ["B", "2", "NVIDIA", "H200"],
    ]


def test_several_devices_in_a_file_are_warned_of_and_told_apart(both):
    c = both([row(100)], [row(50), row(100, device=H200)])
    text = report(c)
    assert "WARNING: B holds rows of 2 devices" in text and "WARNING: A holds" not in text
    assert "TriGRU: 1 faster, 0 slower, 0 the same" in text
    _, head, line = section(text, "TriGRU faster or slower")
    assert "device" in head.split() and H100 in line
    two = [row(100), row(100, device=H200)]
    text = report(both(two, [row(50), row(200, device=H200)]))
    assert "the devices differ" not in text
    lines = section(text, "TriGRU faster or slower")[2:]
    assert [H200 in line for line in lines] == [True, False]
    lines = section(report(both(two, [])), "Only in one file")[2:]
    assert [(line.split()[1], H200 in line) for line in lines] == [("1", False), ("1", True)]
    assert "device" not in section(report(both([row()], [row(50)])), "TriGRU faster or slower")[1]


def test_a_sweep_without_rows_compares(both):
    assert report(both([], [])).endswith("TriGRU: no row has a time in both files.")


# Reading


def test_rows_are_text_and_numbers(tmp_path):
    (read,) = read_rows(write(tmp_path / "a.csv", [row(None, peak_bytes=12, cudnn="")]))
    assert (read["p50_us"], read["peak_bytes"], read["cudnn"]) == (None, 12.0, "")
    assert (read["T"], read["torch"], read["kernel_hash"]) == (512.0, "2.13.0", "0123")


@pytest.mark.parametrize("columns", [("a",), COLUMNS[1:], (*COLUMNS, "more"), COLUMNS[::-1]])
def test_another_kind_of_file_is_refused(tmp_path, columns):
    path = write(tmp_path / "other.csv", [row()], columns)
    with pytest.raises(ValueError, match=r"other\.csv is not a sweep's"):
        read_rows(path)


def test_an_empty_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="not a sweep's"):
        read_rows(tmp_path / "empty.csv")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.csv")


@pytest.mark.parametrize("cut", [False, True])
def test_a_row_with_other_cells_is_refused(tmp_path, cut):
    path = write(tmp_path / "a.csv", [row(), row(B=1)])
    text = path.read_text().rstrip()
    path.write_text(text.rpartition(",")[0] if cut else text + ",more")
    with pytest.raises(ValueError, match="line 3"):
        read_rows(path)
