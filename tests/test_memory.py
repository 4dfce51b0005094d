"""What a call keeps for its backward and what a backward makes, in units of T·B·H; single steps and
sequences in chunks, which carry nothing but the state."""

import pytest
import torch
from layers import F64
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from trigru import ops
from trigru.accuracy import differentiate, eager_loop, problem

FORMS = pytest.mark.parametrize("textbook", [False, True], ids=["torch", "textbook"])


# What a backward makes


class Made(TorchDispatchMode):
    """The tensors, views excepted, that operations make, with the operation's name."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.tensors.append((function.overloadpacket.__name__, t))
        return outputs

    def at_least(self, size):
        return [name for name, t in self.tensors if t.numel() >= size]


@FORMS
@pytest.mark.parametrize(
    "D, walk", [(1, {}), (1, {"reverse": True}), (2, {}), (4, {"heads": 2})], ids=str
)
def test_gradients_of_weights_are_made_without_copies(D, walk, textbook):
    """Nothing as large as y but the walk back's own results and, in the textbook form, the product
    of r with the states, once for each direction."""
    T, B, H = 30, 3, 2
    inputs, cotangents = problem(T, B, D, H, textbook=textbook, dtype=F64)
    inputs["w_hh"].requires_grad_()
    outputs = ops.recurrence(**inputs, textbook=textbook, **walk)
    with Made() as made:
        torch.autograd.grad(outputs, inputs["w_hh"], tuple(cotangents.values()))
    directions = 1 if D == 1 else 2
    expected = ["backward"] * (1 if textbook else 2) + ["mul"] * directions * textbook
    assert made.at_least((T - 1) * B * H * D / directions) == expected


@FORMS
@pytest.mark.parametrize("T", [1, 2, 50])
@pytest.mark.parametrize(
    "D, walk", [(1, {}), (1, {"reverse": True}), (2, {}), (4, {"heads": 2})], ids=str
)
def test_gradients_of_weights(T, D, walk, textbook):
    """T·B is less than one of the CPU's short sums, and several of them."""
    inputs, cotangents = problem(T, 3, D, 4, textbook=textbook, dtype=F64)

    def loop(gx, h0, w_hh, b_hh):
        """Each recurrence alone."""
        each = [
            eager_loop(textbook=textbook, reverse=d >= D // 2 if D > 1 else "reverse" in walk)(
                gx[:, :, d : d + 1], h0[d : d + 1], w_hh[d : d + 1],
                None if b_hh is None else b_hh[d : d + 1],
            )
            for d in range(D)
        ]  # fmt: skip
        y, h_n = zip(*each, strict=True)
        return torch.cat(y, 2), torch.cat(h_n)

    def ours(**inputs):
        return ops.recurrence(**inputs, textbook=textbook, **walk)

    assert_close(differentiate(ours, inputs, cotangents), differentiate(loop, inputs, cotangents))


@FORMS
def test_gradients_of_weights_from_a_state_of_more_bits(textbook):
    inputs, cotangents = problem(9, 4, 1, 16, textbook=textbook, dtype=torch.bfloat16)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        h0 = inputs["h0"].to(dtype)
        cotangents["dh_n"] = cotangents["dh_n"].to(dtype)
        grads.append(
            differentiate(
                lambda **inputs: ops.recurrence(**inputs, textbook=textbook),
                inputs | {"h0": h0},
                cotangents,
            )
        )
    more, same = grads
    assert more["h_n"].dtype == more["dh0"].dtype == torch.float32
    for name in ("dw_hh", "db_hh")[: 1 if textbook else 2]:
        assert_close(more[name], same[name], rtol=0, atol=0)


OUTPUTS = pytest.mark.parametrize("output", [0, 1], ids=["y", "h_n"])


@FORMS
@OUTPUTS
@pytest.mark.parametrize("transformed", [False, True], ids=["", "torch.func"])
def test_an_output_that_is_not_used_has_no_zeros_for_a_gradient(transformed, output, textbook):
    T, B, H = 6, 3, 4
    inputs, _ = problem(T, B, 1, H, textbook=textbook, dtype=F64)

    def loss(gx, h0, w_hh):
        outputs = ops.recurrence(gx, h0, w_hh, inputs["b_hh"], textbook=textbook)
        return outputs[output].sin().sum()

    leaves = [inputs[name] for name in ("gx", "h0", "w_hh")]
    with Made() as made:
        if transformed:
            torch.func.grad(loss, (0, 1, 2))(*leaves)
        else:
            loss(*(t.requires_grad_() for t in leaves)).backward()
    assert "backward" in made.at_least(T * B * H)
    assert not [name for name, t in made.tensors if t.numel() >= T * B * H and not t.any()]
