"""What the runtime costs beside its routines and codecs: memory and allocations over many steps, and the measured timeline."""
