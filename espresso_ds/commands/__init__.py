"""What the `espresso` command does, one file per verb; they glue profiler, planner and integrations together."""
