"""How cuDNN is asked directly: with a library in its place that computes from what it is given."""

import csv
import types
from ctypes import CFUNCTYPE, c_char, c_int

import pytest
import torch

from perf import cudnn
from perf.providers import build_torch, build_trigru, builders
from perf.rows import latest, read_csv
from perf.shapes import Case, asks_cudnn, core
from perf.sweep import Bench, not_measured, run_sweep

CPU = torch.device("cpu")
CASE = Case("torch", "fp16", T=5, B=3, I=4, H=6)
PERSIST_STATIC = 1
NOT_SUPPORTED = 3000


class ErrorString:
    def __call__(self, status):
        assert status == NOT_SUPPORTED
        return b"CUDNN_STATUS_NOT_SUPPORTED"


class FakeCudnn:
    """cuDNN's functions, called through the same signatures. Descriptors hold what they are set to;
    the forward pass computes nn.GRU from the memory that it is pointed to."""

    def __init__(self, refuses=None):
        self.refuses, self.set, self.made = refuses, {}, []
        for name, signature in cudnn.SIGNATURES.items():
            setattr(self, name, self.function(name, signature))
        self.cudnnGetErrorString = ErrorString()

    def function(self, name, signature):
        def called(*arguments):
            if name == self.refuses:
                return NOT_SUPPORTED
            if name.startswith("cudnnCreate"):
                self.made.append(name)
                arguments[0][0] = len(self.made)
            elif name == "cudnnGetRNNWeightSpaceSize":
                arguments[2][0] = 2 * 3 * 6 * (4 + 6 + 2)
            elif name == "cudnnGetRNNTempSpaceSizes":
                arguments[4][0], arguments[5][0] = 32, 0
            elif name == "cudnnRNNForward":
                self.forward(*arguments)
            elif name == "cudnnSetRNNDataDescriptor":
                batch = arguments[4]
                self.set[arguments[0]] = (*arguments[1:6], arguments[6][:batch])
            elif name == "cudnnSetTensorNdDescriptor":
                self.set[arguments[0]] = (arguments[1], arguments[3][:3], arguments[4][:3])
            elif name != "cudnnSetStream":
                self.set[arguments[0]] = arguments[1:]
            return 0

        return CFUNCTYPE(c_int, *signature)(called)

    def forward(
        self, handle, rnn, mode, lengths, x_desc, x, y_desc, y, h_desc, h0, h_n, c_desc, c0, c_n,
        weight_bytes, weights, work_bytes, work, reserve_bytes, reserve,
    ):  # fmt: skip
        half, T, B, I, H = 2, 5, 3, 4, 6  # noqa: E741
        algorithm, *kinds = self.set[rnn][:8]
        assert algorithm == PERSIST_STATIC and kinds == [3, 2, 0, 0, half, 0, 1]
        dropout = self.set[rnn][12]
        assert self.set[rnn][8:12] == (I, H, H, 1) and self.set[rnn][13] == 1
        assert self.set[dropout] == (handle, 0.0, None, 0, 0)
        assert self.set[x_desc] == (half, 0, T, B, I, [T] * B)
        assert self.set[y_desc] == (half, 0, T, B, H, [T] * B)
        assert self.set[h_desc] == (half, [1, B, H], [B * H, H, 1])
        assert memory(lengths, B, torch.int32).tolist() == [T] * B
        assert (mode, c_desc, c0, c_n, reserve_bytes, reserve) == (0, None, None, None, 0, None)
        assert work_bytes == 32 and memory(work, 32, torch.uint8).numel() == 32
        flat = memory(weights, weight_bytes // 2)
        w_ih, w_hh, b_ih, b_hh = flat.split([3 * H * I, 3 * H * H, 3 * H, 3 * H])
        parameters = w_ih.view(-1, I), w_hh.view(-1, H), b_ih, b_hh
        inputs = memory(x, T * B * I).view(T, B, I), memory(h0, B * H).view(1, B, H)
        out, last = torch.gru(*inputs, parameters, True, 1, 0.0, False, False, False)
        memory(y, T * B * H).copy_(out.flatten())
        memory(h_n, B * H).copy_(last.flatten())


def memory(address, count, dtype=torch.float16):
    data = (c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(data, dtype=dtype)


@pytest.fixture
def fake(monkeypatch):
    """A fake cuDNN in the place of the library, which refuses in the function named."""

    def put(refuses=None):
        library = FakeCudnn(refuses)
        for cached in (cudnn.library, cudnn.handle):
            cached.cache_clear()
        monkeypatch.setattr(cudnn.ctypes, "CDLL", lambda name: library)
        return library

    def flatten(weights, *shape):
        assert shape == (4, 4, 3, 6, 0, 1, False, False)
        return torch.cat([w.detach().flatten() for w in weights])

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    yield put
    for cached in (cudnn.library, cudnn.handle):
        cached.cache_clear()


def sweep(path, build=cudnn.build_persistent):
    bench = Bench(CPU, 0, lambda calls: [float(call() is not None) for call in calls], None)
    three = {"aten": build_torch, "trigru": build_trigru, "persistent": build}
    good = run_sweep([CASE], path, bench._replace(builders_of=lambda *_: three))
    rows = {(r["mode"], r["provider"]): r["status"] for r in latest(read_csv(path)[1])}
    return good, rows["forward", "persistent"], rows["training", "persistent"]


def test_cudnn_s_persistent_kernel_is_asked_forward(fake, tmp_path):
    library = fake()
    assert sweep(tmp_path / "sweep.csv") == (True, "ok", "no kernel: cuDNN is asked forward only")
    assert library.made.count("cudnnCreate") == 1


@pytest.mark.parametrize("name", [*cudnn.SIGNATURES])
def test_what_cudnn_refuses_is_said(fake, tmp_path, name):
    fake(name)
    good, forward, _ = sweep(tmp_path / "sweep.csv")
    assert good and forward == f"error: RuntimeError: {name}: CUDNN_STATUS_NOT_SUPPORTED"


def test_weights_of_another_size_are_refused(fake, tmp_path, monkeypatch):
    fake()
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *_: torch.zeros(7))
    _, forward, _ = sweep(tmp_path / "sweep.csv")
    assert forward == "error: RuntimeError: cuDNN wants 432 bytes of weights, not 28"


def test_a_process_that_it_ends_leaves_a_row_to_go_on_after(tmp_path):
    def dies(case, weights, training):
        raise KeyboardInterrupt

    path = tmp_path / "sweep.csv"
    with pytest.raises(KeyboardInterrupt):
        sweep(path, dies)
    (row,) = csv.DictReader(path.open())
    assert (row["provider"], row["status"]) == ("persistent", "error: the process ended here")
    assert not_measured([CASE, CASE._replace(B=9)], path, CPU) == [CASE._replace(B=9)]


def test_it_is_asked_where_pytorch_would_ask_it_for_others():
    asked = [case for case in core() if asks_cudnn(case)]
    assert {(c.dtype, c.H, c.B) for c in asked} == {("fp16", 512, 16), ("fp16", 1024, 64)}
    for case in asked:
        assert "persistent" in builders(case, torch.device("cuda"))
        assert "persistent" not in builders(case, CPU)
        assert "persistent" not in builders(case._replace(dtype="bf16"), torch.device("cuda"))
