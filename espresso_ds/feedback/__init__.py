"""Feedback: what compression drops is not lost, whatever the codec. See `Feedback` for the modes and for what each event does."""

from .feedback import Feedback, may_sum

__all__ = ["Feedback", "may_sum"]
