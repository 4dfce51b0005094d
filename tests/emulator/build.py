"""The emulator itself, C++ that is compiled once for these sources, and where all that is kept."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "machine"
CACHE = Path(tempfile.gettempdir()) / f"trigru-emulator-{os.getuid()}"
COMPILERS = ("c++", "g++", "clang++")
# No contraction: a product and a sum are rounded as the PTX says, on whatever machine this is.
FLAGS = ("-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC")


def compiler() -> list[str]:
    """The command that compiles C++: $CXX or the system's own; empty if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    return []


def why_not() -> str:
    """Why nothing can be emulated here, or "" if it can."""
    if compiler():
        return ""
    return f"needs a C++ compiler: {os.environ.get('CXX') or ', '.join(COMPILERS)} is not there"


def built() -> Path:
    """The shared library, compiled at the first use of these sources. Several processes may do so
    at once: each renames what it has made, and one is as good as another."""
    command = [*compiler(), *FLAGS]
    if len(command) == len(FLAGS):
        raise RuntimeError(why_not())
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    tag = hashlib.sha256(b"\0".join([*map(str.encode, command), *texts])).hexdigest()[:20]
    library = CACHE / f"emulator-{tag}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / "emulator.so"
            subprocess.run([*command, "-o", made, SOURCES / "emulator.cpp"], check=True)
            made.rename(library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, loaded; its functions are described in emulator.cpp."""
    lib = ctypes.CDLL(str(built()))
    lib.emulator_load.restype = ctypes.c_void_p
    lib.emulator_load.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_int]
    lib.emulator_parameters.argtypes = [ctypes.c_void_p]
    pointers = [ctypes.c_void_p] * 3
    lib.emulator_run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] + pointers
    return lib
