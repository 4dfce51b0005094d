"""cuDNN asked for the persistent GRU kernel that nn.GRU does not ask for, forward only.

From compute capability 8.0 on, PyTorch's choice (get_algo in aten/src/ATen/native/cudnn/RNN.cpp)
leaves CUDNN_RNN_ALGO_PERSIST_STATIC to other RNNs than GRUs, and no operator takes an algorithm. So
the library that PyTorch has loaded is called by ctypes, with the types and numbers of cuDNN 9's
cudnn_adv.h. Every function returns a status; any but 0 is an exception."""

import ctypes
from ctypes import POINTER, byref, c_int, c_size_t, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .providers import NoKernel, Provider, Weights, build_torch
from .shapes import Case

HANDLE, NEW, SIZE = c_void_p, POINTER(c_void_p), POINTER(c_size_t)
FLOAT32, INT32, UINT32, ULL = ctypes.c_float, ctypes.c_int32, ctypes.c_uint32, ctypes.c_ulonglong
SIGNATURES: dict[str, tuple] = {
    "cudnnCreate": (NEW,),
    "cudnnSetStream": (HANDLE, c_void_p),
    "cudnnCreateTensorDescriptor": (NEW,),
    "cudnnCreateDropoutDescriptor": (NEW,),
    "cudnnCreateRNNDataDescriptor": (NEW,),
    "cudnnCreateRNNDescriptor": (NEW,),
    "cudnnSetTensorNdDescriptor": (c_void_p, c_int, c_int, POINTER(c_int), POINTER(c_int)),
    "cudnnSetDropoutDescriptor": (c_void_p, HANDLE, FLOAT32, c_void_p, c_size_t, ULL),
    "cudnnSetRNNDataDescriptor": (c_void_p, *[c_int] * 5, POINTER(c_int), c_void_p),
    "cudnnSetRNNDescriptor_v8": (c_void_p, *[c_int] * 8, *[INT32] * 4, c_void_p, UINT32),
    "cudnnGetRNNWeightSpaceSize": (HANDLE, c_void_p, SIZE),
    "cudnnGetRNNTempSpaceSizes": (HANDLE, c_void_p, c_int, c_void_p, SIZE, SIZE),
    "cudnnRNNForward": (
        HANDLE, c_void_p, c_int, c_void_p, *[c_void_p] * 10, c_size_t, c_void_p, c_size_t, c_void_p,
        c_size_t, c_void_p,
    ),
}  # fmt: skip
DATA = {torch.float16: 2, torch.bfloat16: 9}
PERSIST_STATIC, GRU, DOUBLE_BIAS, TENSOR_OP_MATH, FLOAT = 1, 3, 2, 1, 0
INFERENCE, SEQ_MAJOR_UNPACKED, PADDED_IO_ENABLED = 0, 0, 1


@cache
def library() -> Any:
    """cuDNN with its signatures."""
    cudnn = ctypes.CDLL("libcudnn.so.9")  # by this name PyTorch has loaded it
    for name, types in SIGNATURES.items():
        function = getattr(cudnn, name)
        function.argtypes, function.restype = types, c_int
    cudnn.cudnnGetErrorString.argtypes, cudnn.cudnnGetErrorString.restype = [c_int], ctypes.c_char_p
    return cudnn


def call(name: str, *arguments: Any) -> None:
    """Call a function. Raises RuntimeError where its status is not 0."""
    status = getattr(library(), name)(*arguments)
    if status != 0:
        raise RuntimeError(f"{name}: {library().cudnnGetErrorString(status).decode()}")


def new(kind: str) -> c_void_p:
    """A handle or a descriptor. None is ever destroyed: there are a handful in a process."""
    made = c_void_p()
    call(f"cudnnCreate{kind}", byref(made))
    return made


@cache
def handle() -> c_void_p:
    return new("")


def build_persistent(case: Case, weights: Weights, training: bool) -> Provider:
    """One layer in one direction. Raises NoKernel in training, RuntimeError where cuDNN refuses."""
    if training:
        raise NoKernel("cuDNN is asked forward only")
    T, B, H = case.T, case.B, case.H
    like = weights["weight_hh_l0"]
    parameters = build_torch(case, weights, False).parameters
    with torch.no_grad(), torch.cuda.device_of(like):
        flat = torch._cudnn_rnn_flatten_weight(
            parameters, 4, case.I, GRU, H, 0, 1, False, False
        )  # which moves the parameters into one piece
    data, device = DATA[like.dtype], like.device
    dropout, rnn, h_desc = new("DropoutDescriptor"), new("RNNDescriptor"), new("TensorDescriptor")
    call("cudnnSetDropoutDescriptor", dropout, handle(), 0.0, None, 0, 0)
    call(
        "cudnnSetRNNDescriptor_v8", rnn, PERSIST_STATIC, GRU, DOUBLE_BIAS, 0, 0, data, FLOAT,
        TENSOR_OP_MATH, case.I, H, H, 1, dropout, PADDED_IO_ENABLED,
    )  # fmt: skip
    triple = c_int * 3
    call("cudnnSetTensorNdDescriptor", h_desc, data, 3, triple(1, B, H), triple(B * H, H, 1))
    x_desc, y_desc = new("RNNDataDescriptor"), new("RNNDataDescriptor")
    for descriptor, size in ((x_desc, case.I), (y_desc, H)):
        call(
            "cudnnSetRNNDataDescriptor", descriptor, data, SEQ_MAJOR_UNPACKED, T, B, size,
            (c_int * B)(*[T] * B), None,
        )  # fmt: skip
    weight_size, work_size, reserve_size = c_size_t(), c_size_t(), c_size_t()
    call("cudnnGetRNNWeightSpaceSize", handle(), rnn, byref(weight_size))
    if weight_size.value != flat.nbytes:
        raise RuntimeError(f"cuDNN wants {weight_size.value} bytes of weights, not {flat.nbytes}")
    sizes = byref(work_size), byref(reserve_size)
    call("cudnnGetRNNTempSpaceSizes", handle(), rnn, INFERENCE, x_desc, *sizes)
    work = torch.empty(work_size.value, dtype=torch.uint8, device=device)
    lengths = torch.full((B,), T, dtype=torch.int32, device=device)

    def layer(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        x, h0 = x.contiguous(), h0.contiguous()
        y, h_n = x.new_empty(T, B, H), torch.empty_like(h0)
        call("cudnnSetStream", handle(), torch.cuda.current_stream(device).cuda_stream)
        call(
            "cudnnRNNForward", handle(), rnn, INFERENCE, lengths.data_ptr(), x_desc, x.data_ptr(),
            y_desc, y.data_ptr(), h_desc, h0.data_ptr(), h_n.data_ptr(), None, None, None,
            flat.nbytes, flat.data_ptr(), work.nbytes, work.data_ptr(), 0, None,
        )  # fmt: skip
        return y, h_n

    return Provider(layer, parameters)
