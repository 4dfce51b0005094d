import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from interpreted import warm_up
from layers import believing_in_kernels

from perf.evidence import LOST
from perf.measure import is_lost
from trigru import raise_if_failed


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _the_device_is_left_as_it_was(request):
    """After a test on a GPU no wait has given up; where the device is lost, the process ends with
    the test that lost it, and perf.evidence runs the others in a new one."""
    yield
    if not request.node.get_closest_marker("gpu"):
        return
    if is_lost(torch.device("cuda")):
        pytest.exit(f"the device failed in {request.node.name}", returncode=LOST)
    raise_if_failed(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture(scope="session")
def interpreted():
    """`interpreted(function, …)` calls a module's function in a process of its own, in which
    Triton interprets kernels: it decides that when they are decorated, once in a process."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # started, with this environment
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        pool.submit(warm_up).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


@pytest.fixture(params=["aten", "ops", "textbook"])
def form(request, monkeypatch):
    """The variant, and for nn.GRU's form whether ATen's or our own operators compute it: the
    latter do where there is a kernel, so let the layer, but not the operators, believe in one."""
    if request.param == "ops":
        monkeypatch.setattr("trigru.layer.ops", believing_in_kernels())
    return "textbook" if request.param == "textbook" else "torch"
