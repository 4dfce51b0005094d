import os
import signal

import compile_only
import pytest
import torch
from layers import believing_in_kernels

from perf.ahead import compile_ahead_of_tests, compile_launches
from perf.evidence import COMPILED, LOST
from perf.measure import is_lost
from trigru import raise_if_failed

COMPILE_SECONDS = 300  # after which the tests that are left compile for themselves


def pytest_configure():
    if compile_only.folder():
        compile_launches()
    if COMPILED in os.environ:  # the evidence ends its tests by SIGINT; nohup ignores that
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """On a GPU, what says most of the kernels comes first."""
    items.sort(key=lambda item: item.path.name != "test_gpu.py")
    if compile_only.folder():
        items[:] = filter(compile_only.wanted, items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    """Compile on all cores what the tests launch on a GPU, unless the evidence has done so: one
    after another, kernels take longer than the tests."""
    done = compile_only.folder() or COMPILED in os.environ or session.config.option.collectonly
    if done or not torch.cuda.is_available():
        return
    tests = [item.nodeid for item in session.items if compile_only.wanted(item)]
    if len(tests) > 1:
        say = session.config.pluginmanager.get_plugin("terminalreporter").write_line
        say(f"compiling what {len(tests)} tests launch")
        compile_ahead_of_tests(tests, COMPILE_SECONDS)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    if not (folder := compile_only.folder()):
        return None
    compile_only.run_shared(session, folder)
    return True


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


@pytest.fixture(params=["aten", "ops", "textbook"])
def form(request, monkeypatch):
    """The variant, and for nn.GRU's form whether ATen's or our own operators compute it: the
    latter do where there is a kernel, so let the layer, but not the operators, believe in one."""
    if request.param == "ops":
        monkeypatch.setattr("trigru.layer.ops", believing_in_kernels())
    return "textbook" if request.param == "textbook" else "torch"


@pytest.fixture
def one_thread():
    """As torchrun has it: beside other processes, more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
