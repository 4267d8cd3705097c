"""The race: plans against plain DeepSpeed, DDP and its hooks, on emulated clusters with slow links."""
