"""`python -m perf train --task episodes`: the episodes, the three programs and the verdict."""

import csv
import math

import pytest
import torch
from torch.testing import assert_close

from perf import __main__ as command
from perf import episodes
from perf.train import Settings
from trigru import TriGRU

CPU, F64 = torch.device("cpu"), torch.float64
T, B, H = 9, 6, 5
RUNS = (episodes.LOOP, episodes.PADDED, episodes.TRIGRU)
# float64's sums in another order. The errors tried put gradients off by 0.01 and more.
ROUNDING = {"rtol": 0, "atol": 1e-12}


pytestmark = pytest.mark.usefixtures("one_thread")


# The episodes


def walk(steps, rows=256):
    """What `steps` steps show, their marks and their cues, each (steps, rows)."""
    world = episodes.Recall(rows, CPU)
    seen = []
    for _ in range(steps):
        seen.append((world.shown.argmax(-1), world.begins, world.ends, world.asks, world.cues))
        world.step(world.cues)
    return map(torch.stack, zip(*seen, strict=True))


def test_an_episode_begins_where_one_has_ended_and_asks_for_its_first_symbol():
    shown, begins, ends, asks, cues = walk(200)
    assert begins[0].all() and begins[1:].equal(ends[:-1])
    assert not (begins & ends).any() and not (asks & ~ends).any()
    assert (shown == episodes.SYMBOLS).equal(asks)  # the question
    assert cues[begins].equal(shown[begins])
    goes_on = ~begins[1:]
    assert cues[1:][goes_on].equal(cues[:-1][goes_on])
    later = ~begins
    assert ends[later].float().mean() == pytest.approx(episodes.ENDS, abs=0.01)
    assert asks[ends].float().mean() == pytest.approx(episodes.ASKS, abs=0.03)


def test_a_cue_says_nothing_of_the_next_episode():
    """Nor do the steps say where one begins, or what is shown meanwhile what the cue is."""
    shown, begins, _, asks, cues = walk(400)

    def agreement(guesses, where):
        """How far from chance, in standard deviations."""
        right = (guesses == cues[1:])[where[1:]].float()
        noise = math.sqrt(episodes.CHANCE * (1 - episodes.CHANCE) / len(right))
        return abs(right.mean().item() - episodes.CHANCE) / noise

    assert agreement(cues[:-1], begins) < 4
    assert agreement(shown[:-1], begins & ~torch.roll(asks, 1, 0)) < 4  # the end was not told
    assert agreement(shown[:-1], asks & ~torch.roll(begins, 1, 0)) < 4
    assert agreement(cues[:-1], asks) > 100


def test_the_cue_alone_is_the_answer():
    world = episodes.Recall(64, CPU)
    for _ in range(50):
        asks, cues = world.asks, world.cues
        assert world.step(cues).equal(asks.float())
        assert world.step((world.cues + 1) % episodes.SYMBOLS).sum() == 0


def test_what_comes_after_an_episode_does_not_count_for_it(monkeypatch):
    monkeypatch.setattr(episodes, "TRACE", 1.0)  # then they are the discounted rewards, less values
    rewards, values = torch.rand(4, 2, dtype=F64), torch.rand(5, 2, dtype=F64)
    begins = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0], [0, 1]], dtype=torch.bool)
    d = episodes.DISCOUNT
    (r0, r1, r2, r3), v = rewards, values
    first = [r0[0] + d * r1[0], r1[0], r2[0] + d * r3[0] + d**2 * v[4, 0], r3[0] + d * v[4, 0]]
    second = [r0[1] + d * (r1[1] + d * (r2[1] + d * r3[1])), r1[1] + d * (r2[1] + d * r3[1])]
    second += [r2[1] + d * r3[1], r3[1]]
    returns = torch.stack((torch.stack(first), torch.stack(second)), 1)
    assert_close(episodes.advantages(rewards, values, begins), returns - values[:-1], **ROUNDING)


# The three programs


class IgnoresResets(TriGRU):
    def forward(self, x, hx=None, *, resets):
        return super().forward(x, hx)


class ResetsLate(TriGRU):
    def forward(self, x, hx=None, *, resets):
        return super().forward(x, hx, resets=torch.roll(resets, 1, 0))


class IgnoresTheFirst(TriGRU):
    def forward(self, x, hx=None, *, resets):
        resets = resets.clone()
        resets[0] &= len(x) == 1
        return super().forward(x, hx, resets=resets)


class GradientGetsPast(TriGRU):
    def forward(self, x, hx=None, *, resets):
        y, h_n = super().forward(x, hx, resets=resets)
        past = super().forward(x, hx)[0]
        return y.detach() + past - past.detach(), h_n


class OldState(TriGRU):
    def forward(self, x, hx=None, *, resets):
        y, h_n = super().forward(x, hx, resets=resets)
        return y, h_n if len(x) == 1 else y[-2:-1]


class Diverges(TriGRU):
    def forward(self, x, hx=None, *, resets):
        y, h_n = super().forward(x, hx, resets=resets)
        return y * math.inf, h_n


BROKEN = [IgnoresResets, ResetsLate, IgnoresTheFirst, GradientGetsPast, OldState]


def some_resets(kind):
    """(T, B)"""
    resets = torch.rand(T, B) < {"none": 0, "few": 0.15, "many": 0.6, "all": 1}[kind]
    if kind in ("few", "many"):
        resets[0] = torch.arange(B) % 2 == 0
        resets[-1] = torch.arange(B) % 3 == 0
    return resets


def make_rollout(resets):
    symbols = torch.randint(episodes.SHOWN, (T, B))
    x = torch.nn.functional.one_hot(symbols, episodes.SHOWN).to(F64)
    advantages, returns = torch.randn(2, T, B, dtype=F64)
    actions = torch.randint(episodes.SYMBOLS, (T, B))
    h = torch.randn(1, B, H, dtype=F64).tanh()
    return episodes.Rollout(x, resets, actions, advantages, returns, h)


def results(rollout):
    """Of the three runs, in order."""
    layers = episodes.make_layers(H)
    assert tuple(layers) == RUNS
    return [rollout.results(episodes.Agent(layer, H).to(F64)) for layer in layers.values()]


@pytest.mark.parametrize("kind", ["none", "few", "many", "all"])
def test_three_programs_of_one_update(kind):
    loop, padded, trigru = results(make_rollout(some_resets(kind)))
    assert_close(padded, loop, **ROUNDING)
    assert_close(trigru, loop, **ROUNDING)
    assert len(loop) == 3 + 6 and loop[4].any() == (kind != "all")  # U's gradient


@pytest.mark.parametrize("broken", BROKEN)
def test_errors_show_in_an_update(monkeypatch, broken):
    monkeypatch.setattr(episodes, "TriGRU", broken)
    loop, _, trigru = results(make_rollout(some_resets("few")))
    assert max((a - b).abs().max() for a, b in zip(trigru, loop, strict=True)) > 0.01


def test_a_rollout_is_its_pieces():
    layer = episodes.Pieces(H).to(F64)
    calls = []
    layer.gru.register_forward_pre_hook(lambda _, args: calls.append(args))
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[2, 0] = resets[3, 0] = resets[0, 1] = True
    x, h = torch.randn(5, 2, episodes.SHOWN, dtype=F64), torch.randn(1, 2, H, dtype=F64)
    layer(x, h, resets=resets)
    ((padded, entering),) = calls
    pieces = [x[:2, 0], x[2:3, 0], x[3:, 0], x[:, 1]]
    assert padded.equal(torch.nn.utils.rnn.pad_sequence(pieces))
    assert entering[0, 0].equal(h[0, 0]) and not entering[0, 1:].any()


def test_all_act_alike():
    settings = Settings(1, T=12, B=8, H=H)
    runs = [episodes.Run(layer, settings, CPU, F64) for layer in episodes.make_layers(H).values()]
    for _ in range(2):  # the second goes on from the state of the first
        acted = [run.act(settings.T) for run in runs]
        assert acted[0][1:] == acted[1][1:] == acted[2][1:]
        first, *others = (rollout for rollout, _, _ in acted)
        for rollout in others:
            assert rollout.x.equal(first.x) and rollout.actions.equal(first.actions)
            assert_close(tuple(rollout), tuple(first), **ROUNDING)
        for run, (rollout, _, _) in zip(runs, acted, strict=True):
            run.update(rollout)


def test_acting_and_updating_compute_the_same():
    """An update's log-probabilities and state are those by which the agent has acted."""
    run = episodes.Run(episodes.make_layers(H)[episodes.TRIGRU], Settings(1, 12, 8, H), CPU, F64)
    states, draw = [], run.draw
    run.draw = lambda logs: states.append(logs) or draw(logs)
    rollout, _, _ = run.act(12)
    logs, values, h = run.agent(rollout.x, rollout.h, rollout.begins)
    assert_close(logs.detach(), torch.stack(states), **ROUNDING)
    assert_close(rollout.returns - rollout.advantages, values.detach(), **ROUNDING)
    run.update(rollout)
    assert_close(run.h, h.detach(), **ROUNDING)


# The command


@pytest.fixture
def tiny(monkeypatch):
    """`python -m perf train --task episodes` of short episodes that all ask."""
    monkeypatch.setitem(episodes.SETTINGS, "cpu", Settings(60, T=8, B=128, H=32))
    monkeypatch.setattr(episodes, "ENDS", 0.5)
    monkeypatch.setattr(episodes, "ASKS", 1.0)

    def run(folder, *more):
        arguments = ["train", "--task", "episodes", "--device", "cpu", "--out", str(folder)]
        return command.main([*arguments, *more])

    return run


def test_the_runs_learn_and_agree(tiny, tmp_path, capsys):
    assert tiny(tmp_path) == 0
    says = capsys.readouterr().out
    assert "three programs agree" in says and "is more than chance (25%)" in says
    assert (tmp_path / "episodes.png").exists()
    with (tmp_path / "episodes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["step"]) for r in rows] == [
        (n, str(s)) for s in range(1, 61) for n in RUNS
    ]
    assert sum(bool(r["error"]) for r in rows) == 10 * 3
    early, late = ([r for r in rows if int(r["step"]) in steps] for steps in ((1, 2), (59, 60)))
    for part, low, high in ((early, 0.15, 0.35), (late, 0.6, 1)):
        asked, right = (sum(int(r[column]) for r in part) for column in ("questions", "right"))
        assert low < right / asked < high


@pytest.mark.parametrize("broken", BROKEN)
def test_errors_show_in_a_training(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(episodes, "TriGRU", broken)
    settings = Settings(3, T=8, B=32, H=8)
    rows = episodes.run_training(CPU, "fp32", settings, tmp_path / "episodes.csv")
    errors = {run: [r["error"] for r in rows if r["run"] == run] for run in RUNS}
    # The state that enters the first rollout is that of a reset anyway.
    assert min(errors.pop(episodes.TRIGRU)[1:]) > 0.01 > 1e-5 > max(map(max, errors.values()))
    assert "DISAGREE, by the fault of TriGRU:" in episodes.verdict(rows)[1]


def test_a_run_that_disagrees_exits_with_1(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(episodes, "TriGRU", Diverges)
    assert tiny(tmp_path, "--steps", "3", "--hidden", "8") == 1
    assert "DISAGREE, by the fault of TriGRU:" in capsys.readouterr().out
    assert (tmp_path / "episodes.png").exists()


def rows_of(right, errors=(0, 0, 0), allowed=3e-6):
    """A training's rows, where the shares of right answers are functions of the part that is done,
    or as they are given, of the three runs."""
    shares = [part if callable(part) else lambda _, part=part: part for part in right]
    return [
        {
            "run": run, "step": step, "questions": 100, "right": round(100 * share(step / 120)),
            "error": error, "allowed_error": allowed,
        }
        for step in range(1, 121)
        for run, share, error in zip(RUNS, shares, errors, strict=True)
    ]  # fmt: skip


def rising(delay):
    """From 30 % to 90 % in the last third of the training, late by a part of all."""
    return lambda done: 0.3 + 0.6 * min(1, max(0, 3 * (done - delay) - 2))


@pytest.mark.parametrize(
    "right, errors, good",
    [
        ((0.98, 0.98, 0.99), (1e-6, 2e-6, 3e-6), True),
        ((0.98, 0.98, 0.99), (1e-6, 2e-6, 4e-6), False),
        ((0.98, 0.98, 0.99), (4e-6, 2e-6, 1e-6), False),
        ((0.98, 0.98, 0.99), (1e-6, 2e-6, math.nan), False),
        ((0.98, 0.98, 0.99), (1e-6, 2e-6, math.inf), False),
        ((0.99, 0.99, 0.96), (0, 0, 0), False),
        ((0.99, 0.96, 0.99), (0, 0, 0), False),
        ((0.60, 0.60, 0.56), (0, 0, 0), True),  # noise of 2000 questions
        ((0.60, 0.60, 0.54), (0, 0, 0), False),
        ((rising(0), rising(0.03), rising(0.08)), (0, 0, 0), True),
        ((rising(0), rising(0.03), rising(0.15)), (0, 0, 0), False),
        ((rising(0.15), rising(0.13), rising(0)), (0, 0, 0), False),
        ((0.25, 0.26, 0.27), (0, 0, 0), False),  # chance
        ((0.30, 0.31, 0.30), (0, 0, 0), True),
        ((0.30, 0.27, 0.30), (0, 0, 0), False),
    ],
)
def test_the_verdict(right, errors, good):
    assert episodes.verdict(rows_of(right, errors))[0] is good


def test_one_that_is_wrong_allows_itself_nothing():
    errors = {"a": 1e-7, "b": 2e-7, "c": 0.5}
    assert episodes.allowed_error(errors, 0) == pytest.approx(6e-7)
    assert episodes.allowed_error(errors, 1e-6) == 1e-6
