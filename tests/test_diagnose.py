"""The diagnosis names the kernels in which a fault was planted, and no others. The launchers are
stand-ins that compute as the reference does."""

import pytest
import torch

from perf import diagnose
from perf.compiling import TARGETS
from perf.sweep import DeviceLost
from trigru import launch, reference
from trigru.launch import ExchangeTimeout
from trigru.plan import candidates

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
REGIMES = list(diagnose.HIDDEN)
LAUNCHERS = {"forward": "gru_forward", "backward": "gru_backward"}


@pytest.fixture
def lab(monkeypatch, tmp_path):
    return Lab(monkeypatch, tmp_path)


class Lab:
    def __init__(self, monkeypatch, folder):
        self.monkeypatch = monkeypatch
        self.path, self.dump = folder / "diagnose.csv", folder / "diagnose.pt"
        self.launched = []
        monkeypatch.setattr(diagnose, "device_limits", lambda device: TARGETS[90])
        monkeypatch.setattr(diagnose, "LENGTHS", (1, 2))
        monkeypatch.setattr(diagnose, "BATCHES", (1, 3))
        hidden = {"solo": {2: (56,), 4: (56,)}, "latency": {2: (144,), 4: (80,)}}
        hidden["throughput"] = hidden["latency"]
        monkeypatch.setattr(diagnose, "HIDDEN", hidden)
        self.plant("forward", lambda results, **_: results)
        self.plant("backward", lambda results, **_: results)

    def plant(self, walk, fault):
        """From now on `fault(results, of, plan, textbook)` has the last word on a walk's results;
        `of` is the first tensor that it was given."""
        computed = getattr(reference, LAUNCHERS[walk])

        def launcher(*, plan, **given):
            of = given["gx" if walk == "forward" else "dy"]
            self.launched.append((walk, of.dtype, plan.regime, plan.D))
            results = computed(**given)
            return fault(results, of=of, plan=plan, textbook=given["textbook"])

        self.monkeypatch.setattr(getattr(diagnose, walk), LAUNCHERS[walk], launcher)

    def run(self):
        return diagnose.run_diagnosis(diagnose.trials(), CPU, self.path, self.dump)

    def failing(self):
        lines = diagnose.account(self.path).splitlines()
        return [line.split(":")[0].split() for line in lines if line.endswith(" fail")]


def test_what_is_right_passes(lab, capsys, monkeypatch):
    assert lab.run() and not lab.dump.exists()
    assert f"no kernel alone fails, in {len(diagnose.trials())} launches" in capsys.readouterr().out
    assert len(lab.launched) == len(diagnose.trials()) == 2 * 3 * 2 * 3 * 2 * 2 * 2
    lab.launched.clear()
    assert lab.run() and not lab.launched  # all is known
    monkeypatch.setattr(diagnose, "kernel_hash", lambda: "mended")
    assert not diagnose.statuses(lab.path)  # of other kernels


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("walk", LAUNCHERS)
def test_swapped_gates_of_one_variant_and_dtype(lab, capsys, walk, regime):
    def fault(results, of, plan, textbook):
        if not textbook or of.dtype != BF16 or plan.regime != regime:
            return results
        first, second, third, *others = results
        if walk == "forward":
            return first, second, third[..., [1, 0, 2], :]
        r, z, n = first.chunk(3, -1)
        return torch.cat((z, r, n), -1), second, third, *others

    lab.plant(walk, fault)
    assert not lab.run()
    assert lab.failing() == [["textbook", "bf16", walk, regime]]
    said = capsys.readouterr().out
    assert "16 of" not in said and "8 of 8 fail" in said
    H = 56 if regime == "solo" else 144
    result = "gates" if walk == "forward" else "dgx"
    assert f"where H = {H}, directions = 1|2, T = 1|2, B = 1|3; the first: {result}: rel" in said


def test_a_fault_in_some_shapes(lab, capsys):
    def fault(results, of, plan, textbook):
        wrong = of.dtype == FP16 and len(of) == 2 and of.shape[1] == 3 and plan.D == 2
        return (results[0], results[1], results[2] + 0.1) if wrong and not textbook else results

    lab.plant("backward", fault)
    assert not lab.run()
    assert lab.failing() == [["torch", "fp16", "backward", regime] for regime in REGIMES]
    assert capsys.readouterr().out.count("directions = 2, T = 2, B = 3; the first: dh0") == 3


def test_the_smallest_that_fails_is_kept(lab):
    lab.plant("backward", lambda results, **_: (results[0] * 1.5, *results[1:]))
    lab.run()
    kept = torch.load(lab.dump)
    trial = diagnose.Trial(**kept["trial"])
    assert trial[2:] == ("backward", "solo", 56, 1, 1, 1)
    problem = diagnose.make_problem(trial, CPU)
    assert kept["inputs"].keys() == problem.given.keys()
    assert all(torch.equal(kept["inputs"][name], t) for name, t in problem.given.items())
    ratio = kept["got"]["dgx"].double() / kept["expected"]["dgx"]
    assert ratio.sub(1.5).abs().max() < 0.1
    assert "BLOCK_H" in kept["plan"]


@pytest.mark.parametrize("walk", LAUNCHERS)
def test_a_dump_is_small(lab, walk):
    """U is most of it."""
    trial = diagnose.Trial("torch", "bf16", walk, "latency", H=256, directions=1, T=1, B=3)
    diagnose.keep(lab.dump, trial, diagnose.make_problem(trial, CPU), None)
    assert lab.dump.stat().st_size < 600 * 1024


@pytest.mark.parametrize("error", [ExchangeTimeout("gave up"), RuntimeError("out of registers")])
def test_a_kernel_that_raises_is_left_alone(lab, capsys, error):
    def fault(results, of, plan, textbook):
        if (plan.regime, plan.D, of.dtype) == ("latency", 1, BF16):
            raise error
        return results

    lab.plant("forward", fault)
    assert not lab.run()
    assert lab.launched.count(("forward", BF16, "latency", 1)) == 2  # one of each variant
    assert lab.launched.count(("forward", BF16, "latency", 2)) == 2 * 4
    expected = [[variant, "bf16", "forward", "latency"] for variant in ("torch", "textbook")]
    assert lab.failing() == expected
    assert capsys.readouterr().out.count(f"the first: {type(error).__name__}: {error}") == 2
    assert torch.load(lab.dump)["got"] == {}


def test_a_device_that_is_lost_is_found_by_the_next_process(lab):
    lost = []
    lab.monkeypatch.setattr(diagnose, "is_lost", lambda device: bool(lost))

    def fault(results, of, plan, textbook):
        if of.dtype == FP16 and plan.H == 56 and textbook:
            lost.append(plan)
            raise RuntimeError("an illegal memory access was encountered")
        return results

    lab.plant("backward", fault)
    for D in (1, 2):
        with pytest.raises(DeviceLost):
            lab.run()
        assert [plan.D for plan in lost] == [D]
        assert lab.dump.exists() == (D == 2)  # the process that lost the device has no tensors
        lost.clear()
    assert not lab.run() and not lost
    assert lab.failing() == [["textbook", "fp16", "backward", "solo"]]
    kept = torch.load(lab.dump)
    assert kept["got"] == {} and kept["trial"]["directions"] == 1


def test_a_process_that_ends_leaves_word_of_the_kernel(lab, capsys):
    """As by a fault of segmentation; what is not said any more is that the trial ended."""

    class End(BaseException):
        pass

    def fault(results, plan, textbook, **_):
        if plan.D == 2 and plan.regime == "throughput" and textbook:
            raise End
        return results

    lab.plant("forward", fault)
    for _ in range(3):
        with pytest.raises(End):
            lab.run()
    assert not lab.run()
    assert {tuple(line[1:]) for line in lab.failing()} == {
        (dtype, "forward", "throughput") for dtype in ("bf16", "fp16", "fp32")
    }  # fmt: skip
    assert capsys.readouterr().out.count("the first: began") == 3
    assert torch.load(lab.dump)["trial"]["regime"] == "throughput"


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("sm", TARGETS)
def test_every_trial_has_a_plan_of_its_regime(monkeypatch, sm, exact):
    """That is for float32's products as they are there."""
    monkeypatch.setattr(diagnose, "device_limits", lambda device: TARGETS[sm])
    monkeypatch.setattr(launch, "uses_tf32", lambda device: not exact)
    plans = {trial: diagnose.plan_of(trial, CPU) for trial in diagnose.trials()}
    for trial in (trial for trial in plans if trial.dtype == "fp32"):
        assert plans[trial] in candidates(
            TARGETS[sm], B=trial.B, H=trial.H, D=trial.directions, itemsize=4, exact=exact,
            backward=trial.walk == "backward", textbook=trial.variant == "textbook",
        )  # fmt: skip
    assert all(plan.regime == trial.regime for trial, plan in plans.items())
    assert {plan.regime for plan in plans.values()} == {"solo", "latency", "throughput"}
    assert max(trial.H for trial in plans) == 256  # of which a dump is small
