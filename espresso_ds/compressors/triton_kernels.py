"""The kernels for tensors on CUDA, by the names that `backend.kernel` asks for. Arguments are those of `Codec.encode` and
`Codec.decode_sum`, and are not checked.

They are queued on the current stream of the tensors' device, and none makes the host wait, but for one number in the encodings
of TopK and DGC (`triton/topk.py`). Triton compiles a kernel when it is first called, which takes about a second, and keeps it on
disk.
"""

from __future__ import annotations

from .triton.quantize import quantize_decode_sum, quantize_encode
from .triton.sign import onebit_decode_sum, onebit_encode, sign_decode_sum, sign_encode
from .triton.topk import dgc_encode, topk_decode_sum, topk_encode

__all__ = [
    "dgc_encode",
    "onebit_decode_sum",
    "onebit_encode",
    "quantize_decode_sum",
    "quantize_encode",
    "sign_decode_sum",
    "sign_encode",
    "topk_decode_sum",
    "topk_encode",
]
