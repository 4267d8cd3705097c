"""What workers set so that they test the same on all CPUs."""

import deepspeed


def allow_fp16():
    """DeepSpeed refuses fp16 on CPUs without instructions for it; torch computes in it on all."""
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
