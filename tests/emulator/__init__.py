"""Run compiled Triton and Gluon kernels without a GPU, under the library's own launchers.

    with Emulator(sm=90, seed=1) as emulator:
        y, h_n, gates = gru_forward(...)  # CPU tensors, a plan for a real device
    assert not emulator.faults

A kernel is compiled as the JIT would compile it for the device, as far as PTX. The emulator (in
machine/, C++) then runs the whole grid: all programs are resident, their warps are interleaved at
random, threads have their own program counters, and the memory delays what it may. A seed chooses
the schedule, the delays, and which programs are slow or late. What it checks:

* memcheck: bounds and alignment, in global and shared memory. initcheck: reads of what nobody
  wrote.
* racecheck: shared memory between barriers; what a wgmma under way reads, or reads without a proxy
  fence; weak loads of what another program stored; two threads that store one global element.
* synccheck: barriers and warp-wide instructions in diverged warps or after exits; deadlocks.
* protocol: the sentinel is stored, or what is exchanged or written out twice or never.
* "no progress": only waits are left. The clock then jumps past the kernel's own deadline, so that
  its way to report it runs too.
* "note: …" is no fault: equal values stored by several warps, and registers of a wgmma written
  after its fence, which the compiler's copies are.

It is PTX, not SASS: nothing that ptxas does is seen. Sums are of float32, in plain order;
approximate functions are wrong in the last place; there is no time. There are no tcgen05, cp.async,
TMA, clusters or barriers of some warps: an unknown instruction is an error when it is parsed.
"""

from .build import why_not
from .launches import Emulator

__all__ = ["Emulator", "why_not"]
