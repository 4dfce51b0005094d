"""Pictures and README's block: from made-up rows like those of a GPU, with all that can go wrong.

What they say is tested in the numbers and words that are drawn, not in pixels."""

import csv
import math
import warnings
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot as plt

from perf import __main__ as command
from perf import accuracy, plot, plot_sweep, readme, sweep, train
from perf import rows as rows_of
from perf.measure import append_row, kernel_hash
from perf.plot import plot_all, plot_csv, read_csv
from perf.shapes import COARSE, MODES, Case

CASE = Case("torch", "bf16", T=512, B=16, I=256, H=256)
HERE = {
    "device": "Some GPU", "sm": "90", "driver": "1.2", "torch": "2.13", "triton": "3.6",
    "cudnn": "9", "commit": "0123456789ab", "kernel_hash": "0123456789ab",
    "date": "2026-01-02T03:04:05Z",
}  # fmt: skip
GRAPH = "ok: no graph: RuntimeError: cannot be captured"


def row(case=CASE, provider="trigru", us=512.0, mode="forward", status="ok", **more):
    """A sweep's row as it is read; without a time if `us` is None."""
    times = {"p20_us": us and 0.9 * us, "p50_us": us, "p80_us": us and 1.2 * us}
    measured = {"us_per_step": us and us / case.T, "max_rel_err": 1e-3, "status": status}
    peak = (3.0 if provider == "trigru" else 4.0) * 2**20
    others = {"mode": mode, "provider": provider, "floor_us": 50.0, "peak_bytes": peak}
    others |= {"packed": int(case.packed), "host_us": us and 40.0}
    made = HERE | case._asdict() | others | times | measured | more
    assert set(made) == set(sweep.COLUMNS)
    return made


def two(us, them, case=CASE, mode="forward", **more):
    """TriGRU's row and its yardstick's."""
    other = "cudnn" if case.variant == "torch" else "eager"
    return [row(case, "trigru", us, mode, **more), row(case, other, them, mode)]


def like_a_gpu():
    """A grid of shapes at coarse batch sizes, their steps in µs by a made-up rule: TriGRU is slower
    at H = 64 alone. A few are wrong, failed, missing or timed with Python."""
    grid = [(512, H, 1, 1) for H in (64, 128, 256, 512, 768, 1024, 1536, 2048)]
    grid += [(T, 512, 1, 1) for T in (16, 64, 2048)]
    grid += [(512, 512, layers, directions) for layers, directions in ((2, 1), (4, 1), (1, 2))]
    kinds = (("torch", "bf16"), ("torch", "fp16"), ("textbook", "bf16"))
    rows = []
    for (variant, dtype), (T, H, *depth), B in product(kinds, grid, COARSE):
        case = Case(variant, dtype, T, B, H, H, *depth)
        step = 1 + case.H / 256
        yardstick = "cudnn" if case.variant == "torch" else "eager"
        providers = {yardstick: 0.1 + case.H / 64, "trigru": step}
        if (dtype, T, *depth) == ("bf16", 512, 1, 1) and (H, B) in ((256, 1), (1024, 64)):
            providers |= {"eager": 20 * step, "compiled": 10 * step}
        for mode in MODES:
            for provider, us in providers.items():
                us *= case.T * case.layers * case.directions * (1 if mode == "forward" else 3)
                r = row(case, provider, us, mode)
                if provider == "trigru" and case.H == 2048:
                    r = row(case, provider, None, mode, "no kernel: too large", peak_bytes=None)
                elif provider == "trigru" and (case.H, case.B, mode) == (768, 64, "training"):
                    r = row(case, provider, None, mode, "wrong: dx: far off", peak_bytes=None)
                elif provider == "cudnn" and (case.H, case.B) == (1536, 256):
                    r = row(case, provider, None, mode, "error: OutOfMemoryError", peak_bytes=None)
                elif provider == "eager" and mode == "training":
                    r["status"] = GRAPH
                elif (case.H, case.B) == (1024, 256):
                    continue
                rows.append(r)
    return rows


def errors():
    """An accuracy measurement's rows: of 18 results one is too inexact and one infinite, of both
    providers."""
    for result in ("y", "dx", "dweight_ih_l0"):
        for T in (64, 512, 2048):
            for H in (256, 1024):
                for provider in ("cudnn", "trigru"):
                    error = 1e-3
                    if (result, H) == ("dx", 256):
                        error = {64: 1e-3, 512: 4e-3, 2048: math.inf}[T]
                    case = {"variant": "torch", "dtype": "bf16", "T": T, "B": 16, "I": H, "H": H}
                    more = {"provider": provider, "result": result, "rel_err": error}
                    yield HERE | case | more | {"allowed": 3e-3, "status": "ok"}


def write(path, rows, columns=sweep.COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def pictures(folder):
    return sorted(p.name for p in folder.glob("*.png") if p.read_bytes()[:4] == b"\x89PNG")


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def said(monkeypatch):
    """By picture: the titles of its panels, what is written into them, and the small print."""
    found = {}

    def save(figure, rows, path, note=""):
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        texts = [[t.get_text() for t in axes.texts] for axes in figure.axes]
        found[path.stem] = SimpleNamespace(axes=figure.axes, titles=titles, texts=texts, note=note)
        plt.close(figure)
        return path

    monkeypatch.setattr(plot_sweep, "save", save)
    return found


# Drawing


def test_pictures_are_drawn_from_the_csv_alone(tmp_path):
    """Real files, without a warning. What has no data has no picture."""
    rows = [
        r
        for r in like_a_gpu()
        if r["dtype"] == "bf16"
        and (r["variant"] == "torch" or (r["mode"], r["T"]) == ("forward", 512))
    ]
    rows = [r | {"peak_bytes": None} if r["variant"] == "textbook" else r for r in rows]
    path = write(tmp_path / "sweep.csv", rows)
    drawn = plot_csv(path, tmp_path / "drawn")
    kinds = ("throughput", "heatmap", "time", "scaling", "memory", "peers")
    names = [f"sweep-{kind}-torch.png" for kind in kinds]
    names += [f"sweep-{kind}-textbook.png" for kind in kinds if kind != "memory"]
    assert [p.name for p in drawn] == names
    assert pictures(tmp_path / "drawn") == sorted(names) and pictures(tmp_path) == []


def test_the_picture_of_an_accuracy_measurement(tmp_path):
    path = write(tmp_path / "accuracy.csv", errors(), accuracy.COLUMNS)
    assert [p.name for p in plot_csv(path)] == pictures(tmp_path) == ["accuracy-torch.png"]


def test_the_plot_command(tmp_path, monkeypatch):
    """It draws the files that it is given, or everything."""
    drawn = []
    monkeypatch.setattr(command, "plot_csv", lambda *paths: drawn.append(paths) or [])
    monkeypatch.setattr(command, "plot_all", lambda *paths: drawn.append(paths) or [])
    assert command.main(["plot", "a.csv", "b.csv", "--out", "c"]) == command.main(["plot"]) == 0
    assert [tuple(map(str, paths)) for paths in drawn[:2]] == [("a.csv", "c"), ("b.csv", "c")]
    results, file = drawn[2]
    assert file.is_file() and results == file.parent / "perf" / "results"


def test_the_picture_of_the_last_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EVALUATED", (4, 16))
    path, settings = tmp_path / "train.csv", train.Settings(30, T=8, B=4, H=8)
    text = b"It was the best of times. " * 200
    for date in ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"):
        monkeypatch.setattr(train, "now", lambda date=date: date)
        train.run_training(torch.device("cpu"), "fp32", settings, path, text=text)
    assert [p.name for p in plot_csv(path)] == pictures(tmp_path) == ["train.png"]


def test_other_csv_files_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    append_row(path, ("a",), {"a": 1})
    with pytest.raises(ValueError, match="no training, sweep or accuracy"):
        plot_csv(path)


@pytest.mark.parametrize(
    "rows",
    [
        two(100, 200)[:1],
        two(100, 200)[1:],
        two(100, 200) + two(100, 200, CASE._replace(H=7)),
        [row(us=None, status="error: a"), row(provider="cudnn", us=None, status="error: b")],
        two(100, 200, CASE._replace(layers=2)),
        [],
    ],
    ids=["TriGRU", "yardstick", "two shapes", "failed", "two layers", "none"],
)
def test_little_data_is_drawn(said, tmp_path, rows):
    plot_sweep.plot_sweep(rows, tmp_path, "s")
    assert ("s-throughput-torch" in said) == any(r["layers"] == 1 for r in rows)


def test_what_the_pictures_say(said, tmp_path):
    plot_sweep.plot_sweep(like_a_gpu(), tmp_path, "s")
    kinds = ("throughput", "heatmap", "time", "scaling", "memory", "peers")
    assert list(said) == [f"s-{kind}-{v}" for v in ("torch", "textbook") for kind in kinds]
    throughput, heatmap, time, scaling, memory, peers = list(said.values())[:6]

    # Of 8 · 4 shapes none at H = 2048, one without cuDNN and one without a row; then one wrong.
    counts = ["forward: slower in 4 of 26 shapes", "training: slower in 4 of 25 shapes"]
    assert throughput.titles == [f"bf16, {count}" for count in counts]
    assert heatmap.titles == [f"{dtype}, {count}" for dtype in ("bf16", "fp16") for count in counts]
    cells = heatmap.axes[1].texts
    assert len(cells) == 8 * 4
    assert [c.get_text() for c in cells if c.get_weight() == "bold"] == ["0.88×"] * 4
    frames = [p for p in heatmap.axes[1].patches if p.get_edgecolor() == (0, 0, 0, 1)]
    assert [round(p.get_y()) for p in frames] == [0] * 4
    words = [c.get_text() for c in cells if "×" not in c.get_text()]
    assert sorted(words) == ["no cuDNN", *["no kernel"] * 4, "wrong", "–"]
    rings = throughput.axes[0].lines[-1]
    assert rings.get_label() == "slower" and list(rings.get_xdata()) == [0] * 4
    assert list(rings.get_ydata()) == [B / 1.25 * 1e6 for B in COARSE]

    assert time.titles == ["bf16, forward", "bf16, training"]
    (band,) = time.axes[0].collections[0].get_paths()
    heights = band.vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.9 * 1.25, 1.2 * 7))
    dotted = [line for line in time.axes[0].lines if line.get_linestyle() == ":"]
    assert len(dotted) == 3 and set(dotted[0].get_ydata()) == {50 / 512}
    assert scaling.titles == [
        "bf16, forward, H = 512: over T",
        "bf16, training, H = 512: over T",
        "bf16, forward: over layers, directions",
        "bf16, training: over layers, directions",
    ]
    flat = scaling.axes[0].lines[0]
    assert list(flat.get_ydata()) == [3] * 4
    lines = [ends for c in scaling.axes[2].collections for ends in c.get_segments()]
    assert [a[1] for a, b in lines if a[0] != b[0]] == [2, 2, 4]  # directions, layers
    assert memory.titles == ["bf16, training: TriGRU's is 0.75× to 0.75×"]
    assert memory.axes[0].lines[0].get_ydata()[0] == 3

    assert peers.titles == ["bf16, forward", "bf16, training"]
    assert peers.texts[0][0] == "H = 256, B = 1, T = 512"
    assert peers.texts[0][1:5] == [
        " 2 µs, 1.00×",
        " 4.1 µs, 2.0×",
        " 20 µs, 10.0×",
        " 40 µs, 20.0×",
    ]
    where = "bf16; B = 1, 64; H = 256, 1024; 2 in all"
    assert f"Remark on a plain torch loop ({where}): {GRAPH[4:]}" in peers.note.splitlines()
    # Each other picture says what is missing of the two that it shows, and no more.
    cudnn = "No time for nn.GRU (cuDNN)"
    assert throughput.note.splitlines()[1:] == [
        "No time for TriGRU (bf16; B = 64; H = 768; 1 in all): wrong: dx: far off",
        "No time for TriGRU (bf16; B = 1, 16, 64, 256; H = 2048; 8 in all): no kernel: too large",
        f"{cudnn} (bf16; B = 256; H = 1536; 2 in all): error: OutOfMemoryError",
    ]
    assert f"{cudnn} (bf16, fp16; B = 256; H = 1536; 4 in all)" in heatmap.note


def test_over_T_is_drawn_what_has_several(said, tmp_path):
    """Of the H with the most lengths those batches that have many of them."""
    many = [row(CASE._replace(T=T, B=B)) for T in (16, 64, 512) for B in (1, 16)]
    alone = [row(CASE._replace(T=24, B=4096)), row(CASE._replace(T=9, packed=True))]
    many += [row(CASE._replace(T=2048, B=16)), *(row(CASE._replace(T=T, B=8)) for T in (7, 64))]
    few = [row(CASE._replace(H=2048, T=T)) for T in (16, 512)]
    plot_sweep.plot_sweep([*few, *many, *alone], tmp_path, "s")
    scaling = said["s-scaling-torch"]
    assert scaling.titles == ["bf16, forward, H = 256: over T"]
    assert [t.get_text() for t in scaling.axes[0].get_xticklabels()] == ["16", "64", "512", "2048"]
    said.clear()
    plot_sweep.plot_sweep(alone, tmp_path, "s")
    assert "s-scaling-torch" not in said


def test_remarks_are_told_apart():
    rows = [
        row(),
        row(CASE._replace(B=1), status=GRAPH),
        row(CASE._replace(B=2), status="ok: other"),
        row(CASE._replace(B=3), us=None, status="error: A: a"),
        row(CASE._replace(B=4), us=None, status="error: B: b"),
        row(provider="cudnn", status=GRAPH),
    ]
    assert rows_of.remarks(rows) == [
        f"Remark on TriGRU (bf16; B = 1; H = 256; 1 in all): {GRAPH[4:]}",
        "Remark on TriGRU (bf16; B = 2; H = 256; 1 in all): other",
        "No time for TriGRU (bf16; B = 3, 4; H = 256; 2 in all): error: A: a",
        f"Remark on nn.GRU (cuDNN) (bf16; B = 16; H = 256; 1 in all): {GRAPH[4:]}",
    ]
    many = [row(CASE._replace(B=B), status=f"ok: {B}") for B in range(6)]
    assert len(rows_of.remarks(many)) == 5
    assert rows_of.remarks(many)[-1] == "More of the kind in the CSV file: 2."


def test_only_one_of_two_16_bit_dtypes_is_drawn_twice(said, tmp_path):
    rows = [r for r in like_a_gpu() if r["dtype"] == "fp16"]
    plot_sweep.plot_sweep(rows, tmp_path, "s")
    assert said["s-time-torch"].titles == ["fp16, forward", "fp16, training"]


def test_devices_have_pictures_of_their_own(said, tmp_path):
    rows = two(100, 200) + [r | {"device": "Other GPU"} for r in two(100, 90)]
    plot_sweep.plot_sweep(rows, tmp_path, "s")
    assert said["s-some-gpu-throughput-torch"].titles == ["bf16, forward: slower in 0 of 1 shapes"]
    assert said["s-other-gpu-throughput-torch"].titles == ["bf16, forward: slower in 1 of 1 shapes"]


def test_what_the_picture_of_an_accuracy_measurement_says(said, tmp_path):
    refused = "ok: without cuDNN: RuntimeError: no"
    rows = [r | {"status": refused} if r["provider"] == "cudnn" else r for r in errors()]
    plot_sweep.plot_accuracy(rows, tmp_path, "a")
    picture = said["a-torch"]
    assert picture.titles == ["bf16: 2 of 18 results over what is allowed"]
    assert [t.get_text() for t in picture.axes[0].get_xticklabels()] == ["y", "dx", "dW_ih"]
    assert picture.note.splitlines()[1:] == [
        "Over: bf16 dx, T = 512, B = 16, H = 256: 4.0e-03, allowed 3.0e-03",
        "Over: bf16 dx, T = 2048, B = 16, H = 256: inf, allowed 3.0e-03",
        f"nn.GRU (cuDNN): {refused}",
    ]
    # From left to right: by T, then by H.
    xs = next(line for line in picture.axes[0].lines if line.get_label() == "TriGRU").get_xdata()
    assert list(xs) == sorted(xs) and len(set(xs)) == 18


# Numbers


def test_speedups_and_why_there_is_none():
    rows = [
        *two(100, 250),
        *two(100, 99, CASE._replace(B=1)),
        *two(100, 200, CASE._replace(B=2), status=GRAPH),
        *two(None, 200, CASE._replace(B=3), status="wrong: y: far off"),
        *two(None, 200, CASE._replace(B=4)),
        *two(100, None, CASE._replace(B=5)),
        row(CASE._replace(B=6)),
        row(CASE._replace(B=7), "cudnn"),
        row(CASE, "eager", 1.0),
    ]
    speeds = rows_of.speedups(rows)
    assert speeds == {
        (256, 16): 2.5, (256, 1): 0.99, (256, 2): 2.0, (256, 3): "wrong", (256, 4): "not timed",
        (256, 5): "no cuDNN", (256, 6): "no cuDNN",
    }  # fmt: skip
    assert rows_of.losses(speeds) == {(256, 1): 0.99}
    assert rows_of.summary(speeds) == "slower in 1 of 3 shapes"


def test_the_yardstick_is_that_of_the_variant():
    for variant, provider, yardstick in (
        ("torch", "cudnn", "cudnn"), ("torch", "aten", "aten"), ("textbook", "eager", "eager"),
    ):  # fmt: skip
        rows = [row(CASE._replace(variant=variant), p) for p in ("eager", "trigru", provider)]
        assert rows_of.yardstick(rows) == yardstick


def test_of_rows_that_measure_the_same_the_last_counts():
    rows = [*two(100, 200), row(us=50.0), *two(70, 70, mode="training")]
    assert rows_of.speedups(rows_of.latest(rows)[:2]) == {(256, 16): 4.0}
    assert len(rows_of.latest(rows)) == 4


def test_plain_is_one_layer_at_the_commonest_length():
    cases = [CASE, CASE._replace(H=64), CASE._replace(T=64), CASE._replace(T=64, layers=2)]
    rows = [row(case) for case in [*cases, CASE._replace(T=64, directions=2)]]
    assert rows_of.plain(rows) == rows[:2]
    assert rows_of.plain(rows[1:]) == rows[1:2]  # as common, but longer
    packed = [row(CASE._replace(T=64, B=B, packed=True)) for B in range(9)]
    assert rows_of.plain(rows + packed) == rows[:2]


def test_times_relative_to_one_layer():
    deep, both = CASE._replace(layers=4), CASE._replace(directions=2)
    rows = [*two(10, 20), *two(50, 60, deep), *two(15, None, both), row(deep._replace(B=1), us=9.0)]
    rows += two(1, 1, deep._replace(packed=True))
    found = rows_of.relative_times(rows)
    assert found == {(1, 2): {"trigru": [1.5]}, (4, 1): {"trigru": [5.0], "cudnn": [3.0]}}
    assert list(found) == [(1, 2), (4, 1)]


def test_crowded_cases_are_those_of_more_than_two():
    many = [*two(10, 20), row(provider="eager"), row(provider="compiled", us=None)]
    other = CASE._replace(H=1)
    few = [*two(10, 20, other), row(other, "eager", us=None)]
    assert rows_of.crowded([*many, *few]) == [many]
    assert rows_of.crowded([*two(None, 20), row(provider="eager"), row(provider="x")]) == []
    every = [r | {"H": float(H)} for H in range(9, 0, -1) for r in many]
    assert [case[0]["H"] for case in rows_of.crowded(every)] == [4, 5, 6, 7, 8, 9]


def test_small_numbers():
    assert rows_of.throughput(row(us=1024.0), 1024.0) == 16 * 512 / 1024e-6
    assert rows_of.memory_ratios(two(1, 1) + two(1, 1, CASE._replace(B=1))[:1]) == [0.75]
    assert rows_of.spread([256, 1, 8, 16, 32, 64, 128, 1], 4) == [1, 16, 64, 256]
    assert rows_of.spread([5], 3) == [5] and rows_of.spread([5, 6], 3) == [5, 6]
    said = [rows_of.times(ratio) for ratio in (0.5, 0.994, 1.249, 2.04, 31.4, 314)]
    assert said == ["0.50×", "0.99×", "1.25×", "2.0×", "31.4×", "314×"]


# README


@pytest.fixture
def results(tmp_path):
    return tmp_path / "perf" / "results"


def test_nothing_measured(results):
    assert readme.block(results) == readme.NOT_YET
    write(results / "cpu" / "sweep.csv", [r | {"sm": ""} for r in two(100, 200)])
    assert readme.block(results) == readme.NOT_YET


def test_readme_of_a_gpu(results):
    rows = [
        *two(100, 250), *two(100, 90, mode="training"),
        *two(100, 100, CASE._replace(H=64, B=1)),
        *two(None, 300, CASE._replace(H=64, B=1), "training", status="wrong: y: far off"),
        *two(100, 200, CASE._replace(H=64)),
        *two(100, 100, CASE._replace(dtype="fp16")),
        *two(100, 1600, CASE._replace(variant="textbook")),
    ]  # fmt: skip
    rows[-1]["status"] = GRAPH
    write(results / "h" / "sweep.csv", rows)
    (results / "h" / "sweep-time-torch.png").touch()
    assert readme.block(results).split("\n\n") == [
        "**Status: measured on Some GPU** (2026-01-02), with an earlier version of the kernels. "
        "There is no record of the GPU tests. The sweep has 7 measurements of TriGRU, a shape in "
        "one mode each: right in 6 (1 wrong).",
        "Speed relative to nn.GRU (cuDNN): torch variant, bf16, T = 512, forward / training, bold "
        "where TriGRU is slower.",
        "| H \\ B | 1 | 16 |\n| --- | --- | --- |\n"
        "| 64 | 1.00× / wrong | 2.0× / – |\n"
        "| 256 | – / – | 2.5× / **0.90×** |",
        "Forward: geometric mean 1.71×, slower in 0 of 3 shapes, the worst 1.00× at H = 64, B = 1. "
        "Training: geometric mean 0.90×, slower in 1 of 1 shapes, the worst 0.90× at H = 256, "
        "B = 16.",
        "Speed relative to a plain torch loop: textbook variant, bf16, T = 512, forward / "
        "training, bold where TriGRU is slower.",
        "| H \\ B | 16 |\n| --- | --- |\n| 256 | 16.0× / – |",
        "Forward: geometric mean 16.0×, slower in 0 of 1 shapes, the worst 16.0× at H = 256, "
        f"B = 16. 1 of 2 times: “{GRAPH[4:]}”.",
        "| Time per step over H; dotted: the floor |\n| --- |\n"
        "| ![Time per step over H; dotted: the floor]"
        "(perf/results/h/sweep-time-torch.png) |",
        readme.ELSEWHERE,
    ]


def test_every_gpu_has_its_paragraph_and_the_most_measured_its_tables(results):
    write(results / "a" / "sweep.csv", [r | {"device": "GPU A"} for r in two(100, 200)])
    write(results / "b" / "sweep.csv", two(100, 300) + two(100, 300, CASE._replace(B=1)))
    first, second, *others = readme.block(results).split("\n\n")
    assert "measured on GPU A" in first and "measured on Some GPU" in second
    assert len(others) == 4 and "| 256 | 3.0× / – | 3.0× / – |" in others[1]


@pytest.mark.parametrize(
    "hashes, says",
    [
        (["", ""], " with an earlier version of the kernels. "),
        ([kernel_hash(), ""], " partly with an earlier version of the kernels. "),
        ([kernel_hash()] * 2, " with the present kernels. "),
    ],
)
def test_readme_says_which_kernels_were_measured(tmp_path, hashes, says):
    rows = [row(CASE._replace(B=i), kernel_hash=h) for i, h in enumerate(hashes, 1)]
    yardstick = row(provider="cudnn", kernel_hash="old")
    assert says in readme.status([*rows, yardstick], tmp_path / "tests.txt")


STARTS = "==== test session starts ====\n"


@pytest.mark.parametrize(
    "text, says",
    [
        ("129 passed, 1502 deselected in 203.44s", "GPU tests: 129 passed."),
        (
            "== 3 failed, 126 passed, 2 skipped, 9 deselected, 2 warnings, "
            "1 error in 203.44s (0:03:23) ==\n",
            "**GPU tests: 3 failed, 1 error, 126 passed, 2 skipped.**",
        ),
        ("tests/a.py::test_1 passed in 3 steps\n", "**The GPU tests did not all finish.**"),
        ("1502 deselected in 2.0s", "**The GPU tests did not all finish.**"),
        (
            f"{STARTS}!!! _pytest.outcomes.Exit: the device failed !!!\n== 1 failed in 2.0s ==\n"
            f"{STARTS}== 2 passed, 1 deselected in 1.0s ==\n",
            "**GPU tests: 1 failed, 2 passed. The GPU tests took the device down.**",
        ),
        (
            f"{STARTS}Fatal Python error: Segmentation fault\n{STARTS}== 2 passed in 1.0s ==\n",
            "**GPU tests: 2 passed. The GPU tests did not all finish and took the device down.**",
        ),
        (
            f"{STARTS}!!! KeyboardInterrupt !!!\n== 1 passed in 9.0s ==\n",
            "**GPU tests: 1 passed. The GPU tests did not all finish.**",
        ),
        (
            f"{STARTS}!!! _pytest.outcomes.Exit: the device failed !!!\n== 2 passed in 2.0s ==\n",
            "**GPU tests: 2 passed. The GPU tests took the device down.**",
        ),
    ],
)
def test_readme_says_how_the_gpu_tests_ended(tmp_path, text, says):
    path = tmp_path / "tests.txt"
    path.write_text(text, encoding="utf-8")
    assert readme.test_results(path) == says


def test_everything_is_drawn_and_readme_follows(results, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.START}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    rows = two(100, 200, peak_bytes=None)
    path = write(results / "h" / "sweep.csv", rows)
    (results / "h" / "floors.csv").write_text("name\n", encoding="utf-8")  # has no picture
    written = plot_all(results, file)
    assert [p.name for p in written] == [
        f"sweep-{kind}-torch.png" for kind in ("throughput", "heatmap", "time")
    ]
    assert pictures(path.parent) == sorted(p.name for p in written)
    assert file.read_text(encoding="utf-8") == (
        f"before\n{readme.START}\n{readme.block(results)}\n{readme.END}\nafter\n"
    )
    assert "sweep-throughput-torch.png) | ![" in file.read_text(encoding="utf-8")
    assert not readme.update(file, results)
    path.unlink()
    assert readme.update(file, results) and readme.NOT_YET in file.read_text(encoding="utf-8")


def test_all_gpus_are_drawn(results, tmp_path, monkeypatch):
    file = tmp_path / "README.md"
    file.write_text(readme.START + readme.END, encoding="utf-8")
    for folder in ("a", "b"):
        for name in ("sweep", "accuracy", "train", "floors", "kernels"):
            write(results / folder / f"{name}.csv", [])
    monkeypatch.setattr(plot, "plot_csv", lambda path: [path])
    found = [path.relative_to(results).as_posix() for path in plot_all(results, file)]
    assert found == [f"{f}/{name}.csv" for f in "ab" for name in ("accuracy", "sweep", "train")]
    assert readme.NOT_YET in file.read_text(encoding="utf-8")


def test_numbers_are_read_and_empty_cells_are_none(tmp_path):
    columns, (read,) = read_csv(write(tmp_path / "sweep.csv", [row(us=None)]))
    assert columns == sweep.COLUMNS
    assert read == row(us=None) and read["p50_us"] is None and read["T"] == 512.0
