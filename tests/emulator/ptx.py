"""The PTX that the JIT would make of a launch, for a device that is not there."""

import functools
import hashlib
import inspect
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from .build import CACHE


@dataclass(frozen=True)
class Ptx:
    text: str
    name: str
    shared_bytes: int
    num_warps: int


@functools.cache
def _binder(kernel: Any, sm: int) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, _backend(sm))


@functools.cache
def _backend(sm: int) -> Any:
    return make_backend(GPUTarget("cuda", sm, 32))


def compile_as_jit(kernel: Any, sm: int, args: tuple, kwargs: dict) -> tuple[Ptx, dict, dict]:
    """What the JIT would compile for this call on such a device, with the same specialisation of
    integers and pointers; the bound arguments, by name; of these, those that are passed."""
    bound, specialization, options = _binder(kernel, sm)(*args, **kwargs)
    options |= {"debug": False, "instrumentation_mode": ""}
    options, signature, constexprs, attrs = kernel._pack_args(
        _backend(sm), options, bound, specialization, None
    )
    make_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make_source(kernel, signature, constexprs, attrs)
    passed = {name: bound[name] for name, kind in signature.items() if kind != "constexpr"}
    return _cached(source, sm, options), bound, passed


def _cached(source: ASTSource, sm: int, options: Any) -> Ptx:
    path = CACHE / f"{hashlib.sha256(_key(source, sm, options).encode()).hexdigest()[:24]}.json"
    if path.exists():
        return Ptx(**json.loads(path.read_text()))
    compiled = _compile(source, sm, options)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / path.name
        made.write_text(json.dumps(vars(compiled)))
        made.rename(path)
    return compiled


def _key(source: ASTSource, sm: int, options: Any) -> str:
    """All that the PTX depends on, with where its sources are, which it names. Triton's own key
    knows of a constexpr's class by its fields only; what its properties compute depends on the file
    that it is in."""
    files = {inspect.getfile(type(v)) for v in source.constants.values() if _is_ours(v)}
    texts = [Path(file).read_text() for file in sorted(files)]
    where = inspect.getfile(source.fn.fn), triton.__file__
    return repr([source.hash(), sm, options.hash(), triton.__version__, texts, where])


def _is_ours(value: Any) -> bool:
    module = sys.modules.get(type(value).__module__)
    return not isinstance(value, type) and hasattr(module, "__file__")


def _compile(source: ASTSource, sm: int, options: Any) -> Ptx:
    """`triton.compile` up to PTX: it would have ptxas assemble it, and fill Triton's cache."""
    backend, target = _backend(sm), GPUTarget("cuda", sm, 32)
    options = backend.parse_options(options.__dict__ | source.parse_options())
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
        context,
    )  # fmt: skip
    metadata = {"target": target, **options.__dict__}
    names = list(stages)
    for name in names[names.index(source.ext) : names.index("ptx") + 1]:
        module = stages[name](module, metadata)
    if metadata["global_scratch_size"]:
        raise ValueError(f"{metadata['name']} needs scratch memory, which is not emulated")
    return Ptx(module, metadata["name"], metadata["shared"], metadata["num_warps"])
