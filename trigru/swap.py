"""TriGRUs in the place of a whole model's nn.GRUs, and back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .layer import TriGRU


def replace_gru(model: nn.Module) -> int:
    """Put a TriGRU with the same parameters where `model` holds an nn.GRU, however deep.

    Optimisers that hold the parameters go on working. A layer that is used in several places is
    replaced by one TriGRU in all of them, and `torch.compile`'s wrappers around one run the TriGRU.
    Subclasses of nn.GRU are left alone, for what they change is not known, and so are parametrised
    ones. What comes along is as in `TriGRU.from_torch`: hooks, pruning included, but a handle to a
    hook removes it from the nn.GRU only.

    Only registered modules are seen: an nn.GRU that a model also keeps elsewhere, as in a list or
    by a bound method, goes on running there. FSDP has to wrap the model after this.

    Returns how many layers were replaced. Raises ValueError if `model` itself is an nn.GRU, which
    nothing holds: use `TriGRU.from_torch` for it."""
    if type(model) is nn.GRU:
        raise ValueError("the model itself is an nn.GRU: use TriGRU.from_torch(model)")
    return _replace(model, nn.GRU, TriGRU.from_torch)


def restore_gru(model: nn.Module) -> int:
    """Put an nn.GRU with the same parameters where `model` holds a TriGRU: the inverse of
    `replace_gru`, for tools that know nn.GRU alone. What is said there holds here.

    Returns how many layers were replaced. Raises ValueError, and changes nothing, if one cannot be
    an nn.GRU (see `TriGRU.to_torch`), or if `model` itself is a TriGRU: use its `to_torch`."""
    if type(model) is TriGRU:
        raise ValueError("the model itself is a TriGRU: use model.to_torch()")
    refused = [
        f"{name!r}: {why}"
        for name, module in model.named_modules()
        if type(module) is TriGRU and (why := module.why_no_gru())
    ]
    if refused:
        raise ValueError("; ".join(refused))
    return _replace(model, TriGRU, TriGRU.to_torch)


def _replace(model: nn.Module, kind: type, convert: Callable[[Any], nn.Module]) -> int:
    """Put `convert(layer)` where `model` holds a layer of `kind`: in all places, or, where a parent
    refuses it, in none."""
    new = {module: convert(module) for module in model.modules() if type(module) is kind}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in new
    ]
    done = []
    try:
        for parent, name, child in places:
            _put(parent, name, new[child])
            done.append((parent, name, child))
    except Exception:
        for place in done:
            _put(*place)
        raise
    return len(new)


def _put(parent: nn.Module, name: str, layer: nn.Module) -> None:
    setattr(parent, name, layer)  # not _modules: a parent may have its own way with attributes
    if parent._modules.get(name) is not layer:
        raise RuntimeError(
            f"{type(parent).__name__} did not keep the {type(layer).__name__} as its {name!r}"
        )
    if isinstance(parent, torch._dynamo.OptimizedModule):  # its forward is bound to the old layer
        anew = parent.dynamo_ctx(layer)  # as torch.compile makes one, with the same options
        parent.forward = anew.forward
        parent._torchdynamo_orig_callable = anew._torchdynamo_orig_callable
