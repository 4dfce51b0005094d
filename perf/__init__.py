"""Training and timing of TriGRU against PyTorch's own GRU: `python -m perf --help`."""

import os
from contextlib import suppress

with suppress(ImportError):  # Triton is not on every machine
    import triton

    # Or inductor, once it compiles anything, moves Triton's cache in its process to a folder of its
    # own, in which nothing that was compiled ahead is found.
    os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
