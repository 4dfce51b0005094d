"""README's quick start runs as it is pasted, its two commands are there for CI to run, and what it
says of the evidence is what the evidence says."""

import re
from pathlib import Path

from perf.readme import END, START, block

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quick_start_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 10
    exec(code, {})
    shapes = "torch.Size([100, 16, 512]) torch.Size([4, 16, 256]) torch.Size([100, 16, 256])"
    assert capsys.readouterr().out.strip() == shapes


def test_two_commands():
    (block,) = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert re.fullmatch(r"# run the main job\n.+ && .+\n# pass the tests\n.+ && pytest\n", block)


def test_evidence_is_up_to_date():
    _, rest = README.split(START)
    said, _ = rest.split(END)
    assert said.strip() == block(ROOT / "perf" / "results"), "run `python -m perf plot`"
