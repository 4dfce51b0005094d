"""README's quick start runs as it is pasted, its two commands are there for CI to run, and what it
says of the evidence is what the evidence says."""

import re
from pathlib import Path

from perf.readme import END, START, block

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quick_start_and_what_goes_on_from_it_run(capsys):
    start, *others = re.findall(r"```python\n(.*?)```", README, re.S)
    assert all(len(code.strip().splitlines()) <= 12 for code in (start, *others))
    names = {}
    exec(start, names)
    shapes = "torch.Size([100, 16, 512]) torch.Size([4, 16, 256]) torch.Size([100, 16, 256])"
    assert capsys.readouterr().out.strip() == shapes
    assert len(others) == 1
    exec(others[0], names)
    assert capsys.readouterr().out.strip() == "torch.Size([16, 64]) torch.Size([2, 16, 64])"


def test_two_commands():
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert re.fullmatch(r"# run the main job\n.+ && .+\n# pass the tests\n.+ && pytest\n", block)


def test_what_is_supported_is_tested():
    _, section = README.split("## What is supported\n")
    lines = section.split("\n## ")[0].splitlines()
    _, *rows = [line.split("|") for line in lines if line.startswith("| ")]
    assert rows
    tests = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row[-2])
        assert named and tests.issuperset(named), f"{row[1]}: {named}"


def test_evidence_is_up_to_date():
    _, rest = README.split(START)
    said, _ = rest.split(END)
    assert said.strip() == block(ROOT / "perf" / "results"), "run `python -m perf plot`"
