"""`TriGRU` through torch.onnx.export: the graph has GRU nodes, and ONNX Runtime our numbers.

ONNX is imported where it is used: the tests that need a GPU are collected where it is not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

from trigru import TriGRU, convert, ops

IN, H, T, B = 4, 3, 5, 2
VARIANT = pytest.mark.parametrize("variant", ops.VARIANTS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec"),
]


def export(model, *inputs, **how):
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False, **how)


def check(program):
    import onnx

    onnx.checker.check_model(program.model_proto, full_check=True)


def session(program):
    """What ONNX Runtime computes, as a function of the inputs in their order."""
    import onnxruntime

    check(program)
    model = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [argument.name for argument in model.get_inputs()]

    def run(*inputs):
        values = (x.numpy() for x in inputs)
        return [torch.tensor(y) for y in model.run(None, dict(zip(names, values, strict=True)))]

    return run


def gru_nodes(program):
    assert {node.domain for node in program.model.graph} == {""}  # none but ONNX's own operators
    return [node for node in program.model.graph if node.op_type == "GRU"]


@VARIANT
@pytest.mark.parametrize(
    "settings",
    [{"bias": False}, {"bidirectional": True, "batch_first": True}],
    ids=["no bias", "both directions, batch first"],
)
def test_a_stack_of_any_length_and_batch(variant, settings):
    layer = TriGRU(IN, H, num_layers=2, variant=variant, **settings)
    D = 2 if layer.bidirectional else 1
    steps, batch = torch.export.Dim("T"), torch.export.Dim("B")
    dims = (batch, steps) if layer.batch_first else (steps, batch)
    dynamic = {"input": dict(enumerate(dims)), "hx": {1: batch}}
    shape = (B, T, IN) if layer.batch_first else (T, B, IN)
    program = export(layer, torch.randn(shape), torch.randn(2 * D, B, H), dynamic_shapes=dynamic)

    nodes = gru_nodes(program)
    assert len(nodes) == 2
    for node, part in zip(nodes, convert.unstack(layer), strict=True):
        inputs = convert.to_onnx(part)
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes == {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            "linear_before_reset": inputs.pop("linear_before_reset"),
        }
        for value, expected in zip(node.inputs[1:4], inputs.values(), strict=True):
            if expected is None:
                assert value is None
            else:  # the projection is the node's own, and its weights are constants
                np.testing.assert_array_equal(value.const_value.numpy(), expected)

    run = session(program)
    for steps, batch in ((T, B), (1, 1), (T + 3, B + 4)):
        x = torch.randn((batch, steps, IN) if layer.batch_first else (steps, batch, IN))
        hx = torch.randn(2 * D, batch, H)
        with torch.no_grad():
            assert_close(run(x, hx), list(layer(x, hx)))


class Classifier(nn.Module):
    """A layer with what may stand around it."""

    def __init__(self, **settings):
        super().__init__()
        self.embedding = nn.Embedding(7, IN, device=settings.get("device"))
        self.gru = TriGRU(IN, H, batch_first=True, num_layers=2, dropout=0.5, **settings)
        self.head = nn.Linear(H, 7, device=settings.get("device"))

    def forward(self, tokens):
        y, h_n = self.gru(self.embedding(tokens))
        return self.head(y), h_n


@VARIANT
def test_in_a_model(variant):
    model = Classifier(variant=variant).eval()
    program = export(
        model,
        torch.randint(7, (B, T)),
        dynamic_shapes=({0: torch.export.Dim("B"), 1: torch.export.Dim("T")},),
    )
    assert len(gru_nodes(program)) == 2
    run = session(program)
    for shape in ((B, T), (1, 1), (4, 9)):
        tokens = torch.randint(7, shape)
        with torch.no_grad():
            assert_close(run(tokens), list(model(tokens)))


def test_the_node_is_on_the_layers_device():
    """On another device than the CPU; a meta tensor stands for CUDA's, and has no data to fold."""
    tokens = torch.randint(7, (B, T), device="meta")
    program = export(Classifier(device="meta").eval(), tokens, optimize=False)
    assert len(gru_nodes(program)) == 2


@VARIANT
def test_unbatched_input_of_half_precision(variant):
    layer = TriGRU(IN, H, variant=variant, dtype=torch.float16)
    program = export(layer, torch.randn(T, IN, dtype=torch.float16))
    assert len(gru_nodes(program)) == 1
    check(program)
    y, h_n = program.model.graph.outputs
    assert (y.shape, h_n.shape) == ((T, H), (1, H))
    assert {y.dtype, h_n.dtype} == {program.model.graph.inputs[0].dtype}


@VARIANT
def test_torch_export_keeps_the_operator(variant):
    layer = TriGRU(IN, H, num_layers=2, bidirectional=True, variant=variant)
    x = torch.randn(T, B, IN)
    export(layer, x)
    program = torch.export.export(layer, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("trigru.forward.default") == 2
    assert not any("onnx" in target for target in targets)
    assert_close(program.module()(x), layer(x))


def test_a_packed_sequence_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = TriGRU(IN, H)

        def forward(self, data):
            return self.gru(PackedSequence(data, torch.tensor([2, 2, 1])))[1]

    refused = "TriGRU exports no PackedSequence to ONNX; pad the input"
    with pytest.raises(torch.onnx.OnnxExporterError, match=refused):
        export(Packed(), torch.randn(5, IN))
