"""Training on more GPUs than this machine can hold, by simulation: see `python -m benchmarks.sweep --help`."""
