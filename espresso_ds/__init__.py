"""espresso_ds: planned compression of the communication of DeepSpeed training.

Importing this package imports nothing else: the interpreter's start-up hook goes through it (see
`espresso_ds.integrations.boot`), so it has to cost nothing in processes that never train.
"""

__version__ = "0.1.0"
