"""What the study's models learn from: images and text that installed packages ship, so that nothing is downloaded.

Images are scikit-learn's handwritten digits, 8 x 8. Those who wrote the training images are mostly not those who wrote the
held-out ones, as the file has them in the order in which they came in. Text is the race's, Python's reference manual; what the
text model knows before it is fine-tuned on it comes from the docstrings of Python's standard library.

Training examples are fixed and have numbers, for AQ-SGD remembers each; a seed gives the order of each epoch.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..race.data import text_bytes

TRAINING_IMAGES, HELD_OUT_IMAGES = 768, 1024
LENGTH = 64
"""Bytes of a window of text."""
TRAINING_WINDOWS, HELD_OUT_WINDOWS = 1024, 128
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
"""Folders of the standard library that are not its own, without prose, or the manual itself."""

MicroBatch = tuple[Tensor, ...]


class Examples(NamedTuple):
    """Inputs and labels, an example a row."""

    inputs: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """What is learnt from, and what is held out."""

    training: Examples
    held_out: Examples


@cache
def images() -> Parts:
    """Digits: fp32 [n, 1, 8, 8] of mean about 0, and int64 [n]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 0.6, torch.from_numpy(found.target).long()
    first, last = slice(TRAINING_IMAGES), slice(TRAINING_IMAGES, TRAINING_IMAGES + HELD_OUT_IMAGES)
    return Parts(Examples(pixels[first], labels[first]), Examples(pixels[last], labels[last]))


@cache
def windows() -> Parts:
    """Windows of the manual, byte for byte: int64 [n, LENGTH], and the bytes that follow each."""
    parts = text_bytes()
    return Parts(_windows(parts.training, TRAINING_WINDOWS), _windows(parts.held_out, HELD_OUT_WINDOWS))


@cache
def docstrings() -> Tensor:
    """The standard library's docstrings as int64 bytes, those that occur several times once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if not NOT_READ & set(path.relative_to(root).parts):
            found |= dict.fromkeys(_docstrings_of(path))
    return torch.frombuffer(bytearray("\n\n".join(found).encode()), dtype=torch.uint8).long()


def epoch(examples: Examples, size: int, seed: int, number: int) -> Iterator[MicroBatch]:
    """Micro-batches of one epoch: inputs, labels, and the numbers of the examples."""
    order = torch.randperm(len(examples.inputs), generator=torch.Generator().manual_seed(1000 * seed + number))
    for chosen in order.split(size):
        yield examples.inputs[chosen], examples.labels[chosen], chosen


def in_order(examples: Examples, size: int) -> Iterator[MicroBatch]:
    """All examples in micro-batches of equal size, to evaluate."""
    return zip(examples.inputs.split(size), examples.labels.split(size), strict=True)


def _windows(tokens: Tensor, count: int) -> Examples:
    """Windows spread evenly over the text, so that every topic has its share."""
    starts = torch.linspace(0, len(tokens) - LENGTH - 1, count).long()
    cut = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
    return Examples(cut[:, :-1].contiguous(), cut[:, 1:].contiguous())


def _docstrings_of(path: Path) -> list[str]:
    """A module's, in the order of the file; none of a file that is no Python, of which a library may have some."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
