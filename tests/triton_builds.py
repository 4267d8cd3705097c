"""Compiling every Triton kernel for a GPU that need not be there: the interpreter runs much that the compiler refuses.

`test_triton.py` runs this file in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from espresso_ds.compressors.blocks import BLOCK
from espresso_ds.compressors.triton import quantize, sign, topk
from espresso_ds.compressors.triton.common import EXACT

AMPERE = GPUTarget("cuda", 80, 32)
MEMORIES = {"none": None, "float32": "*fp32", "bfloat16": "*i16"}
"""Types of residuals as kernels take them. None and 1 are constants to Triton, as they are at a launch."""


def ptx(kernel, **arguments):
    """The machine code of a kernel, launched with strings for types and anything else for constants."""
    constants = {(i,): arguments[name] for i, name in enumerate(kernel.arg_names) if not isinstance(arguments[name], str)}
    signature = {name: type_ if isinstance(type_, str) else "constexpr" for name, type_ in arguments.items()}
    signature = {name: signature[name] for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants), target=AMPERE, options=EXACT).asm["ptx"]


def assert_rounds_as_torch(code):
    """No product is added without being rounded, and no small number is flushed to zero."""
    assert not re.findall(r"\bfma\S*\.f32|\.ftz", code)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("two_means", (False, True), ids=("sign", "onebit"))
def test_signs(two_means, memory):
    form = {"n": "i64" if memory else 1, "blocks": "i32" if memory else 1, "TWO_MEANS": two_means, "BLOCK": BLOCK}
    assert_rounds_as_torch(ptx(sign._encode, x="*fp32", residual=memory, kept=memory, payload="*u8", **form))
    rows = {"rows": "*u8", "count": "i32" if memory else 1, "stride": "i64" if memory else "i32"}
    assert_rounds_as_torch(ptx(sign._decode, **rows, out="*fp32", ADD=memory is None, **form))


@pytest.mark.parametrize("bits", (1, 4, 7, 8))
@pytest.mark.parametrize("symmetric", (False, True), ids=("minmax", "absmax"))
def test_quantization(bits, symmetric):
    memory = list(MEMORIES.values())[bits % 3]
    form = {"n": "i64" if memory else 1, "BITS": bits, **quantize._grid(bits, symmetric), "BLOCK": BLOCK}
    code = ptx(quantize._encode, x="*fp32", residual=memory, kept=memory, payload="*u8", limit="fp32", **form)
    assert_rounds_as_torch(code)
    assert re.findall(r"add\S*\.f32\b.*\b0f4B000000", code), "2**23 is no longer added to round to integers"
    assert_rounds_as_torch(ptx(quantize._decode, rows="*u8", count="i32", stride="i32", out="*fp32", ADD=symmetric, **form))


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_selection(memory):
    form = {"x": "*fp32", "velocity": memory, "residual": memory, "momentum": "fp32", "scale": "fp32", "n": "i64"}
    keeping = {"velocity_kept": memory, "kept": memory, "index": "*i64", "values": "*fp32"}
    assert_rounds_as_torch(ptx(topk._count, **form, low="*i32", counts="*i32", TILE=topk._TILE))
    assert_rounds_as_torch(ptx(topk._list, **form, low="*i32", starts="*i64", ties="i32", **keeping, TILE=topk._TILE))
    assert_rounds_as_torch(ptx(topk._round, **keeping, sent="*i16", number="i32", ENTRIES=topk._ENTRIES))


def test_scatter():
    """Its threads wait for each other before a row adds to what others of them have written."""
    rows = {"rows": "*u8", "count": "i32", "stride": "i32", "starts": "*i64", "ends": "*i64"}
    code = ptx(topk._scatter, **rows, out="*fp32", n="i64", blocks="i32", k="i32", BLOCK=topk.BLOCK, ENTRIES=topk._ENTRIES)
    assert_rounds_as_torch(code)
    assert "bar.sync" in code
