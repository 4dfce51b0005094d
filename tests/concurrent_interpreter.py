"""The real kernels in Triton's interpreter, one process per program, all running at once.

Triton interprets the programs of a launch one after another, so one that waits for another would
wait for ever. The arguments' storages are shared memory here and every program is a forked
process, so the exchange happens as it does on a device.
"""

import os
import signal
import time
import traceback
from itertools import product

import torch
from triton.runtime.interpreter import interpreter_builder


class Concurrently:
    """Stands in for a kernel: `Concurrently(kernel)[grid](...)` runs each program in a process.

    missing: a grid index whose program never starts."""

    def __init__(self, kernel, missing: tuple[int, int, int] | None = None, timeout: int = 120):
        self.kernel, self.missing, self.timeout = kernel, missing, timeout

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            for arg in args:
                if isinstance(arg, torch.Tensor):
                    arg.untyped_storage().share_memory_()
            indices = [i for i in product(*map(range, grid)) if i != self.missing]
            children = [self._fork(grid, index, args, kwargs) for index in indices]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            failed = {i: code for i, code in zip(indices, codes, strict=True) if code}
            assert not failed, f"programs failed, by grid index: {failed}"

        return run

    def _fork(self, grid, index, args, kwargs) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            signal.alarm(self.timeout)
            set_idx, set_dim = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
            interpreter_builder.set_grid_dim = lambda *_: set_dim(*grid)
            interpreter_builder.set_grid_idx = lambda *_: set_idx(*index)
            load = interpreter_builder.create_masked_load

            def load_and_let_others_run(*load_args):
                if load_args[-1]:  # volatile: a poll
                    time.sleep(1e-4)
                return load(*load_args)

            interpreter_builder.create_masked_load = load_and_let_others_run
            self.kernel[(1,)](*args, **kwargs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
