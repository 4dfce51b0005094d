"""`python -m perf train --task episodes`: an actor-critic whose episodes end at any step.

One agent three times, from the same weights and on the same episodes: with TriGRU, which takes a
rollout whole, with its resets; with nn.GRU on the pieces between the resets, padded to the longest;
and with a loop of nn.GRUCell. In exact arithmetic they are one program."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigru import TriGRU
from trigru.accuracy import relative_error

from .measure import FACTS, append_row, facts, now
from .progress import tqdm
from .providers import DTYPES, flatten
from .train import (
    EVALUATIONS,
    SEED,
    SMOOTHING,
    Optimiser,
    Row,
    Settings,
    rounding_of,
    time_on,
)

COLUMNS = (
    *FACTS, "run", "dtype", "T", "B", "H", "step", "questions", "right", "loss", "error",
    "allowed_error", "steps_per_s", "update_steps_per_s",
)  # fmt: skip

TRIGRU, PADDED, LOOP = "TriGRU", "nn.GRU padded", "nn.GRUCell loop"

SETTINGS = {"cpu": Settings(200, T=32, B=64, H=64), "cuda": Settings(200, T=64, B=1024, H=256)}

SYMBOLS = 4
SHOWN = SYMBOLS + 1  # with the question
CHANCE = 1 / SYMBOLS
ENDS = 1 / 8  # of an episode's steps after its first
ASKS = 1 / 2  # of the ends

LEARNING_RATE = 5e-3
DISCOUNT, TRACE = 0.5, 0.9  # of rewards, and of generalised advantages
VALUE_WEIGHT, ENTROPY_WEIGHT = 0.5, 0.01

LAST = 1 / 6  # of a run, whose answers are judged

# How far an update may be from float64's, as a relative error of all that it computes: FACTOR times
# what is in the middle of the three, but at least FLOOR roundings of the dtype.
#
# Measured with the CPU's settings, 2e-7 to 2e-6. Errors gave more from the first look on: resets
# ignored 0.5 and more, a step late 0.5, for gradients alone 0.07, at a rollout's first step 0.1, an
# h_n one step old 0.6.
ERROR_FACTOR, ERROR_FLOOR = 3.0, 4.0

# How far apart the shares of right answers may be. A different rounding will in time choose another
# action, and from there on the runs are draws of one distribution. So what is allowed is the
# difference of two draws, FACTOR times, but at least FLOOR, and that one run is behind another by a
# part LAG of all updates. Measured after 200 updates: 98.7 %, 98.8 % and 99.1 %; with resets
# ignored 59 %, a step late 26 %. After 100 in bfloat16, in the midst of learning: 62 %, 70 %, 72 %.
SHARE_FACTOR, SHARE_FLOOR = 3.0, 0.02
LAG = 0.1


class Recall:
    """B rows of episodes, each of which begins where the one before it in its row has ended.

    A step shows one of SYMBOLS symbols, drawn anew each time; an episode's first is its cue. At any
    later step the episode may end, and often it just does. Else its last step shows a question in
    place of a symbol, and the cue is the answer that brings 1. Nothing shown tells a first step
    from others: who goes by what was shown alone takes cues for what they are not."""

    def __init__(self, B: int, device: torch.device) -> None:
        self.random = torch.Generator(device).manual_seed(SEED)
        self.ends = torch.ones(B, dtype=torch.bool, device=device)
        self.cues = torch.zeros(B, dtype=torch.long, device=device)
        self._show()

    def _show(self) -> None:
        """The next step of all rows: what is shown (B, SHOWN), and whether an episode begins,
        ends or asks there (B,)."""
        how: dict[str, Any] = {"generator": self.random, "device": self.ends.device}
        ending, asking = torch.rand(2, len(self.ends), **how)
        symbols = torch.randint(SYMBOLS, self.ends.shape, **how)
        self.begins = self.ends
        self.cues = torch.where(self.begins, symbols, self.cues)
        self.ends = ~self.begins & (ending < ENDS)
        self.asks = self.ends & (asking < ASKS)
        self.shown = F.one_hot(torch.where(self.asks, SYMBOLS, symbols), SHOWN)

    def step(self, actions: Tensor) -> Tensor:
        """Answer with the actions (B,), symbols, and go on; the rewards (B,)."""
        rewards = (self.asks & (actions == self.cues)).float()
        self._show()
        return rewards


# The three layers: x (T, B, SHOWN), h (1, B, H), resets (T, B) → y (T, B, H), h_n (1, B, H)


class Pieces(nn.Module):
    """nn.GRU on what lies between the resets, side by side and padded to the longest."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.gru = nn.GRU(SHOWN, H)

    def forward(self, x: Tensor, h: Tensor, *, resets: Tensor) -> tuple[Tensor, Tensor]:
        h = h.masked_fill(resets[0, :, None], 0)
        if len(x) == 1:
            return self.gru(x, h)
        # The steps in one line, row after row: a piece begins at a reset and where a row does.
        begins = resets.t().clone()  # (B, T)
        begins[:, 0] = True
        first = begins.flatten().nonzero().flatten()  # of each piece
        piece = begins.flatten().cumsum(0) - 1  # of each step
        step = torch.arange(len(piece), device=x.device) - first[piece]  # within its piece
        padded = x.new_zeros(int(step.max()) + 1, len(first), x.shape[-1])
        padded[step, piece] = x.transpose(0, 1).flatten(0, 1)
        entering = h.new_zeros(1, len(first), h.shape[-1])
        entering[:, piece.view(begins.shape)[:, 0]] = h
        y, _ = self.gru(padded, entering)
        y = y[step, piece].view(*begins.shape, -1).transpose(0, 1)
        return y, y[-1:]


class Loop(nn.Module):
    """nn.GRUCell, its state masked at every step."""

    def __init__(self, H: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(SHOWN, H)

    def forward(self, x: Tensor, h: Tensor, *, resets: Tensor) -> tuple[Tensor, Tensor]:
        (state,), y = h, []
        for x_t, reset in zip(x, resets, strict=True):
            state = self.cell(x_t, state.masked_fill(reset[:, None], 0))
            y.append(state)
        return torch.stack(y), state[None]


def make_layers(H: int) -> dict[str, nn.Module]:
    """The three layers by run, with the same weights."""
    torch.manual_seed(SEED)
    layers = {LOOP: Loop(H), PADDED: Pieces(H), TRIGRU: TriGRU(SHOWN, H)}
    for layer in layers.values():
        copy_weights(layers[LOOP], layer)
    return layers


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Whose parameters have the same order, if not the same names or dtype."""
    for theirs, own in zip(source.parameters(), target.parameters(), strict=True):
        own.copy_(theirs)


class Agent(nn.Module):
    """A recurrent layer, and the logits of the actions and the value from its state."""

    def __init__(self, layer: nn.Module, H: int) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(SEED)
        self.head = nn.Linear(H, SYMBOLS + 1)

    def forward(self, x: Tensor, h: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions (T, B, SYMBOLS), values (T, B), both in float32 at
        least, and the state (1, B, H) after all of x (T, B, SHOWN)."""
        if len(x) == 1 and isinstance(self.layer, TriGRU):  # acting
            y, h = self.layer.step(x[0], h.masked_fill(begins[0, :, None], 0))
            y = y[None]
        else:
            y, h = self.layer(x, h, resets=begins)
        numbers = self.head(y)
        if numbers.dtype.itemsize < 4:
            numbers = numbers.float()
        logits, values = numbers.split((SYMBOLS, 1), -1)
        return logits.log_softmax(-1), values.squeeze(-1), h


class Rollout(NamedTuple):
    """T steps of B rows, as an update needs them."""

    x: Tensor  # (T, B, SHOWN)
    begins: Tensor  # (T, B)
    actions: Tensor  # (T, B)
    advantages: Tensor  # (T, B)
    returns: Tensor  # (T, B)
    h: Tensor  # (1, B, H), before the first step

    def loss(self, logs: Tensor, values: Tensor) -> Tensor:
        """The sum of the losses of all steps, of log-probabilities (T, B, SYMBOLS) and values."""
        chosen = logs.gather(-1, self.actions[..., None]).squeeze(-1)
        policy = -(chosen * self.advantages).sum()
        value = (values - self.returns).square().sum()
        entropy = -(logs.exp() * logs).sum()
        return policy + VALUE_WEIGHT * value - ENTROPY_WEIGHT * entropy

    def results(self, agent: Agent) -> list[Tensor]:
        """All that an update computes: log-probabilities, values, the state and the gradients."""
        logs, values, h = agent(self.x, self.h, self.begins)
        gradients = torch.autograd.grad(self.loss(logs, values), list(agent.parameters()))
        return [logs.detach(), values.detach(), h.detach(), *gradients]

    def double(self) -> "Rollout":
        return Rollout(*(t.double() if t.is_floating_point() else t for t in self))


def advantages(rewards: Tensor, values: Tensor, begins: Tensor) -> Tensor:
    """Generalised advantages (T, B) of rewards (T, B), values and begins (T + 1, B), the latter of
    the step after the last, too: what an episode brings later counts until the next one begins."""
    gains, gain = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        later = DISCOUNT * ~begins[t + 1]
        gain = rewards[t] - values[t] + later * (values[t + 1] + TRACE * gain)
        gains[t] = gain
    return gains


class Run:
    """An agent in training: its episodes, its optimiser and the state it carries along."""

    def __init__(
        self, layer: nn.Module, settings: Settings, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.agent = Agent(layer, settings.H).to(device=device)
        self.optimiser = Optimiser(self.agent, LEARNING_RATE)
        self.agent.to(dtype=dtype)
        if isinstance(layer, Pieces):
            flatten(layer.gru)
        self.episodes = Recall(settings.B, device)
        self.random = torch.Generator(device).manual_seed(SEED + 1)
        self.h = torch.zeros(1, settings.B, settings.H, device=device, dtype=dtype)

    @torch.no_grad()
    def act(self, T: int) -> tuple[Rollout, int, int]:
        """T steps, one by one; also how many questions they asked and how many answers were
        right."""
        seen, h, episodes = [], self.h, self.episodes
        for _ in range(T):
            x, begins, asks = episodes.shown.to(self.h.dtype), episodes.begins, episodes.asks
            logs, values, h = self.agent(x[None], h, begins[None])
            actions = self.draw(logs[0])
            seen.append((x, begins, actions, values[0], asks, episodes.step(actions)))
        x, begins, actions, values, asks, rewards = map(torch.stack, zip(*seen, strict=True))
        after = episodes.shown.to(self.h.dtype), episodes.begins
        _, value, _ = self.agent(after[0][None], h, after[1][None])
        values = torch.cat((values, value))
        gains = advantages(rewards, values, torch.cat((begins, after[1][None])))
        rollout = Rollout(x, begins, actions, gains, gains + values[:-1], self.h)
        return rollout, int(asks.sum()), int(rewards.sum())

    def draw(self, logs: Tensor) -> Tensor:
        """Actions (B,) by log-probabilities (B, SYMBOLS). The same random numbers choose the same
        actions in all runs, but where rounding decides."""
        number = torch.rand(len(logs), 1, generator=self.random, device=logs.device)
        return (logs.exp().cumsum(-1) < number).sum(-1).clamp(max=SYMBOLS - 1)

    def update(self, rollout: Rollout) -> Tensor:
        """A step of training; the mean loss."""
        logs, values, h = self.agent(rollout.x, rollout.h, rollout.begins)
        self.h = h.detach()
        loss = rollout.loss(logs, values)
        self.agent.zero_grad()
        loss.backward()
        self.optimiser.step(rollout.actions.numel())
        return loss.detach() / rollout.actions.numel()


def run_training(
    device: torch.device,
    dtype: str,
    settings: Settings,
    path: Path,
    *,
    clock: Callable[[], float] = time.perf_counter,
    layers: Callable[[int], dict[str, nn.Module]] = make_layers,
) -> list[Row]:
    """Train all runs update by update in turn, and append a row for each update of each run to the
    CSV file at `path`. `clock` tells the time in seconds. The rows."""
    steps, T, B, H = settings
    element = DTYPES[dtype]
    runs, probes = (
        {name: Run(layer, settings, device, element) for name, layer in layers(H).items()}
        for _ in range(2)
    )
    exact = Agent(Loop(H), H).to(device, torch.float64)
    floor = ERROR_FLOOR * rounding_of(element, device)
    known = facts(device) | {"date": now(), "dtype": dtype, "T": T, "B": B, "H": H}

    def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        start = time_on(device, clock)
        result = call(*arguments)
        return result, time_on(device, clock) - start

    rows: list[Row] = []
    bar = tqdm(range(steps), unit="step", desc="train")
    for step in bar:
        errors: dict[str, float] = {}
        for name, run in runs.items():
            (rollout, questions, right), acting = timed(run.act, T)
            if name == LOOP and (step + 1) % max(1, steps // EVALUATIONS) == 0:
                agents = {name: probe.agent for name, probe in probes.items()}
                errors = errors_of(agents, exact, run.agent, rollout)
            loss, updating = timed(run.update, rollout)
            row = {
                "run": name,
                "step": step + 1,
                "questions": questions,
                "right": right,
                "loss": loss.item(),
                "error": errors.get(name),
                "allowed_error": allowed_error(errors, floor) if errors else None,
                "steps_per_s": round(T * B / (acting + updating)),
                "update_steps_per_s": round(T * B / updating),
            }
            rows.append(known | row)
            append_row(path, COLUMNS, rows[-1])
        recent = [r for r in rows[-SMOOTHING * len(runs) :] if r["run"] == TRIGRU]
        bar.set_postfix_str(f"{TRIGRU}: {share(recent):.0%} of the answers right", False)
    return rows


def errors_of(
    agents: Mapping[str, Agent], exact: Agent, weights: Agent, rollout: Rollout
) -> dict[str, float]:
    """By agent, with these weights, the largest relative error of what an update on the rollout
    computes, from what `exact` does, which is of float64."""
    for agent in (*agents.values(), exact):
        copy_weights(weights, agent)
    truth = rollout.double().results(exact)
    return {
        name: max(map(relative_error, rollout.results(agent), truth))
        for name, agent in agents.items()
    }


def allowed_error(errors: Mapping[str, float], floor: float) -> float:
    """The largest error that any of the three may have: if one is wrong, the other two tell."""
    return max(floor, ERROR_FACTOR * statistics.median(errors.values()))


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether the three programs agree and have learnt, and sentences that say within what."""
    judged = [r for r in rows if r["error"] is not None]
    wrong = {r["run"] for r in judged if not r["error"] <= r["allowed_error"] < math.inf}
    worst = max(judged, key=lambda r: r["error"] / r["allowed_error"])
    same = f"DISAGREE, by the fault of {', '.join(sorted(wrong))}" if wrong else "agree"

    steps = max(r["step"] for r in rows)
    lag = round(LAG * steps)
    right, before = (
        {name: share(window(rows, name, end)) for name in (TRIGRU, PADDED, LOOP)}
        for end in (steps, steps - lag)
    )
    questions = max(1, sum(r["questions"] for r in window(rows, TRIGRU, steps)))
    allowed = max(SHARE_FLOOR, math.sqrt(2) * noise(right[LOOP], questions))
    agrees = all(right[a] >= before[b] - allowed for a, b in itertools.permutations(right, 2))
    learnt = min(right.values()) > CHANCE + noise(CHANCE, questions)
    answered = ", ".join(f"{name} {each:.1%}" for name, each in right.items())
    return not wrong and agrees and learnt, (
        f"The updates of the three programs {same}: a relative error of {worst['error']:.1e} in "
        f"outputs, state and gradients at worst ({worst['allowed_error']:.1e} is allowed). Right "
        f"are of the last {questions:.0f} answers {answered}, which "
        f"{'agrees' if agrees else 'DISAGREES'} ({allowed:.1%} apart is allowed, and {lag} updates "
        f"behind) and is {'more' if learnt else 'NOT MORE'} than chance ({CHANCE:.0%})."
    )


def noise(p: float, questions: float) -> float:
    """How far from p the share of right answers may be, if each is right with probability p."""
    return SHARE_FACTOR * math.sqrt(p * (1 - p) / questions)


def window(rows: Sequence[Row], name: str, end: float) -> list[Row]:
    """The run's rows up to the step `end`, as many as it is judged by."""
    width = max(1, round(LAST * max(r["step"] for r in rows)))
    return [r for r in rows if r["run"] == name and end - width < r["step"] <= end]


def share(rows: Sequence[Row]) -> float:
    """The share of right answers; nan where nothing was asked."""
    questions = sum(r["questions"] for r in rows)
    return sum(r["right"] for r in rows) / questions if questions else math.nan
