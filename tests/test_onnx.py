"""`TriGRU` through torch.onnx.export: the graph has GRU nodes, and ONNX Runtime our numbers.

ONNX is imported where it is used: the tests that need a GPU are collected where it is not."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

from trigru import TriGRU, convert, gru, ops

IN, H, T, B = 4, 3, 5, 2
VARIANT = pytest.mark.parametrize("variant", ops.VARIANTS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode"),
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights"),
    pytest.mark.filterwarnings("ignore:# The axis name"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def export(model, *inputs, **how):
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False, **how)


def export_by_torchscript(model, *inputs, dynamic):
    """With the exporter before dynamo's. dynamic: of each input, its dimensions of any size."""
    import onnx

    names, file = [f"input{k}" for k in range(len(inputs))], io.BytesIO()
    axes = {
        name: {k: f"{name}_{k}" for k in dims} for name, dims in zip(names, dynamic, strict=True)
    }
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
    return onnx.load_from_string(file.getvalue())


def check(program):
    import onnx

    onnx.checker.check_model(program.model_proto, full_check=True)


def session(program):
    check(program)
    return session_of(program.model_proto)


def session_of(proto):
    """What ONNX Runtime computes, as a function of the inputs in their order."""
    import onnxruntime

    model = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
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


@pytest.mark.parametrize("with_hx", [False, True], ids=["", "hx"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "batch_first": True}],
    ids=["one", "no bias", "stack"],
)
def test_by_torchscript(form, settings, with_hx):
    """dynamo=False: one node a layer, its weights constants, and any T and B."""
    import onnx

    layer = TriGRU(IN, H, **settings, variant=form).eval()
    layers = layer.num_layers * (2 if layer.bidirectional else 1)

    def case(steps, batch):
        x = torch.randn((batch, steps, IN) if layer.batch_first else (steps, batch, IN))
        return (x, torch.randn(layers, batch, H))[: 1 + with_hx]

    proto = export_by_torchscript(layer, *case(T, B), dynamic=[[0, 1], [1]][: 1 + with_hx])
    onnx.checker.check_model(proto, full_check=True)
    nodes = [node for node in proto.graph.node if node.op_type == "GRU"]
    assert len(nodes) == layer.num_layers
    constants = {tensor.name for tensor in proto.graph.initializer}
    assert all(name in constants for node in nodes for name in node.input[1:4] if name)
    run = session_of(proto)
    for sizes in ((T, B), (1, 1), (T + 3, B + 4)):
        inputs = case(*sizes)
        with torch.no_grad():
            assert_close(run(*inputs), list(layer(*inputs)))


@pytest.mark.parametrize("variant", ["torch", "textbook"])
def test_torchscript_refuses_a_packed_sequence(variant):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = TriGRU(IN, H, variant=variant)

        def forward(self, x, lengths):
            output, _ = self.gru(pack_padded_sequence(x, lengths))
            return pad_packed_sequence(output)[0]

    with pytest.raises(NotImplementedError, match="TriGRU exports no PackedSequence to ONNX; pad"):
        export_by_torchscript(
            Packed(), torch.randn(3, 2, IN), torch.tensor([3, 1]), dynamic=[[], []]
        )


class Recurrence(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.how = how

    def forward(self, *inputs):
        return gru(*inputs, **self.how)


@VARIANT
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_the_recurrence_alone(variant, reverse, dynamo):
    model = Recurrence(variant=variant, reverse=reverse)
    weights = torch.randn(3 * H, H), torch.randn(3 * H)

    def case(steps, batch):
        inputs = torch.randn(steps, batch, 3 * H), torch.randn(batch, H), *weights
        return inputs if variant == "torch" else inputs[:3]

    example = case(T, B)
    if dynamo:
        steps, batch = torch.export.Dim("T"), torch.export.Dim("B")
        dims = [{0: steps, 1: batch}, {0: batch}, None, None][: len(example)]
        program = export(model, *example, dynamic_shapes=(tuple(dims),))
        assert len(gru_nodes(program)) == 1
        run = session(program)
    else:
        dynamic = [[0, 1], [0], [], []][: len(example)]
        run = session_of(export_by_torchscript(model, *example, dynamic=dynamic))
    for sizes in ((T, B), (1, 1), (T + 3, B + 4)):
        inputs = case(*sizes)
        assert_close(run(*inputs), list(model(*inputs)), rtol=1e-4, atol=1e-5)


@VARIANT
def test_an_exported_program_is_refused_in_clear_words(variant):
    model = Classifier(variant=variant).eval()
    program = torch.export.export(model, (torch.randint(7, (B, T)),))
    refused = r"no ExportedProgram with a TriGRU inside: give it the model itself, torch.onnx.expo"
    with pytest.raises(torch.onnx.OnnxExporterError, match=refused):
        torch.onnx.export(program, dynamo=True, verbose=False)


# What an ONNX GRU node has, and what it has not


def layer_of_heads(variant):
    layer = TriGRU(
        IN, 4, num_layers=2, bidirectional=True, batch_first=True, heads=2, learn_reset=True,
        variant=variant,
    )  # fmt: skip
    nn.init.normal_(layer.reset_state)
    return layer.eval()


def assert_any_sizes(run, layer):
    for sizes in ((B, T), (1, 1), (B + 4, T + 3)):
        x = torch.randn(*sizes, IN)
        with torch.no_grad():
            assert_close(run(x), list(layer(x)), rtol=1e-4, atol=1e-5)


def test_heads_and_a_learned_initial_state():
    """Dense nodes, whose weights are constants; the state is there for any B."""
    layer = layer_of_heads("textbook")
    dims = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    program = export(layer, torch.randn(B, T, IN), dynamic_shapes=(dims,))
    dense = convert.to_dense(layer)
    plain = TriGRU(IN, 4, num_layers=2, bidirectional=True, variant="textbook")
    plain.load_state_dict(dense.state_dict(), strict=False)  # all but the reset state
    for node, part in zip(gru_nodes(program), convert.unstack(plain), strict=True):
        R = node.inputs[2].const_value.numpy()
        np.testing.assert_array_equal(R, convert.to_onnx(part)["R"])
    assert_any_sizes(session(program), layer)


def test_heads_and_a_learned_initial_state_by_torchscript(form):
    layer = layer_of_heads(form)
    proto = export_by_torchscript(layer, torch.randn(B, T, IN), dynamic=[[0, 1]])
    assert [node.op_type for node in proto.graph.node].count("GRU") == 2
    assert_any_sizes(session_of(proto), layer)


class Modified(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.gru = TriGRU(IN, H, **settings)

    def forward(self, x, resets=None, update_scale=None):
        return self.gru(x, resets=resets, update_scale=update_scale)[0]


class ModifiedRecurrence(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, x, resets=None, update_scale=None):
        h0, w_hh = x.new_zeros(x.shape[1], 3), x.new_ones(9, 3)
        return gru(x, h0, w_hh, resets=resets, update_scale=update_scale, **self.settings)[0]


@pytest.mark.parametrize("model, size", [(Modified, IN), (ModifiedRecurrence, 3 * H)], ids=str)
@pytest.mark.parametrize("lacking", ["resets", "update_scale", "clip"])
def test_what_a_node_does_not_have(model, size, lacking):
    made = model(**{"clip": 0.5} if lacking == "clip" else {})
    x = torch.randn(T, B, size)
    inputs = {"resets": (x, torch.zeros(T, B, dtype=torch.bool)), "clip": (x,)}
    inputs["update_scale"] = x, None, torch.ones(T, B)
    refused = "an ONNX GRU node has no resets, no update_scale and no clip"
    if lacking == "resets":  # dynamo's exporter tries again and again
        with pytest.raises(torch.onnx.OnnxExporterError, match=refused):
            export(made, *inputs[lacking])
    with pytest.raises(NotImplementedError, match=refused):
        export_by_torchscript(made, *inputs[lacking], dynamic=[[]] * len(inputs[lacking]))


def test_what_torchscript_is_given_by_name_is_refused_as_well():
    """Which its exporter gives by position."""
    given = torch.randn(T, B, IN), {"resets": torch.zeros(T, B, dtype=torch.bool)}
    with pytest.raises(
        NotImplementedError, match="an ONNX GRU node has no resets, no update_scale"
    ):
        torch.onnx.export(TriGRU(IN, H, variant="textbook"), given, io.BytesIO(), dynamo=False)
