"""TriGRU: a GRU layer for PyTorch whose recurrence runs in persistent Triton kernels."""

from .launch import ExchangeTimeout
from .layer import TriGRU, replace_gru
from .ops import gru

__version__ = "0.1.0"
__all__ = ["ExchangeTimeout", "TriGRU", "gru", "replace_gru"]
