"""TriGRU: a GRU layer for PyTorch whose recurrence runs in persistent Triton kernels."""

from . import convert
from .launch import ExchangeTimeout, raise_if_failed
from .layer import TriGRU
from .ops import gru, resets_from_cu_seqlens
from .swap import replace_gru, restore_gru

__version__ = "0.1.0"
__all__ = [
    "ExchangeTimeout", "TriGRU", "convert", "gru", "raise_if_failed", "replace_gru",
    "resets_from_cu_seqlens", "restore_gru",
]  # fmt: skip
