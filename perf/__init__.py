"""Training and timing of TriGRU against PyTorch's own GRU: `python -m perf --help`."""
