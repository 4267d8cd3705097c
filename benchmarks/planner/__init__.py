"""What the planner is worth and what it costs: see `python -m benchmarks.planner --help`."""
