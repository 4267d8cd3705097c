"""What the race's models learn from: text and images that installed packages ship, so that nothing is downloaded.

Text is Python's own reference manual, as `help()` shows it (`pydoc_data.topics` of the standard library, 370 kB once paragraphs
that several topics share are taken once). Images are the letters and digits of the fonts that Matplotlib ships, drawn at several
sizes and angles. Both are the same on every machine with the same version of Python, and of Matplotlib, Pillow and tokenizers.

A batch is a tuple of tensors and depends on (seed, step, rank) alone; drawing one is indexing. What is held out never occurs in
training: every tenth group of paragraphs, every character in two or three of the 21 fonts.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple, Protocol

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Batch = tuple[torch.Tensor, ...]

HELD_OUT_WINDOWS = 32
"""Of text, each as long as those of training."""
GROUP = 20
"""Neighbouring paragraphs that are held out together, so that few sentences are split off their context."""
MASK = 0
"""Token that stands for a masked one."""
MASKED_SHARE = 0.15

CHARACTERS = string.digits + string.ascii_letters
FONTS = (
    *(f"DejaVu{family}.ttf" for family in ("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"{name}10.ttf" for name in ("cmr", "cmb", "cmss", "cmti", "cmtt")),
)
DRAWINGS = 6
"""Of each character in each font."""
HELD_OUT_DRAWINGS, DRAWINGS_AT_ONCE = 256, 64


class Source(Protocol):
    """Where a workload's batches come from."""

    def batch(self, generator: np.random.Generator, size: int) -> Batch:
        """`size` examples of the training part."""
        ...

    def held_out(self) -> list[Batch]:
        """The fixed held-out part, in batches of equal size."""
        ...


class Part(NamedTuple):
    """Training and held-out text as tokens, int64."""

    training: torch.Tensor
    held_out: torch.Tensor


@dataclass(frozen=True)
class NextByte:
    """Windows of text, byte for byte: (int64 [size, length],); every byte is to be foretold from those before it."""

    length: int

    def batch(self, generator: np.random.Generator, size: int) -> Batch:
        """Windows at random places."""
        return (_windows(text_bytes().training, generator, size, self.length),)

    def held_out(self) -> list[Batch]:
        """The first windows of the held-out text."""
        return [(_cut(text_bytes().held_out, self.length),)]


@dataclass(frozen=True)
class MaskedTokens:
    """Windows of text as tokens, 15% of them masked.

    (int64 [size, length] with MASK in places, int64 [size, k] the places, int64 [size, k] the tokens that were there.)
    """

    length: int
    vocabulary: int

    def batch(self, generator: np.random.Generator, size: int) -> Batch:
        """Windows at random places, masked at random."""
        return self._mask(_windows(text_tokens(self.vocabulary).training, generator, size, self.length), generator)

    def held_out(self) -> list[Batch]:
        """The first windows of the held-out text, always masked alike."""
        return [self._mask(_cut(text_tokens(self.vocabulary).held_out, self.length), np.random.default_rng(0))]

    def _mask(self, tokens: torch.Tensor, generator: np.random.Generator) -> Batch:
        masked = round(MASKED_SHARE * self.length)
        places = torch.from_numpy(generator.random(tokens.shape).argsort(axis=1)[:, :masked].copy())
        return tokens.scatter(1, places, MASK), places, tokens.gather(1, places)


@dataclass(frozen=True)
class Glyphs:
    """Drawn characters: (fp32 [size, 1, side, side], int64 [size] index into CHARACTERS)."""

    side: int

    def batch(self, generator: np.random.Generator, size: int) -> Batch:
        """Drawings at random."""
        images, labels = drawings(self.side, held_out=False)
        chosen = torch.from_numpy(generator.integers(len(labels), size=size))
        return _pixels(images[chosen]), labels[chosen]

    def held_out(self) -> list[Batch]:
        """Drawings spread over all held-out characters."""
        images, labels = drawings(self.side, held_out=True)
        chosen = torch.linspace(0, len(labels) - 1, HELD_OUT_DRAWINGS).long()
        return [(_pixels(images[part]), labels[part]) for part in chosen.split(DRAWINGS_AT_ONCE)]


@cache
def text() -> tuple[str, str]:
    """The manual's training and held-out part."""
    paragraphs = dict.fromkeys(each for topic in sorted(topics) for each in re.split(r"\n\s*\n", topics[topic].strip()))
    parts: tuple[list[str], list[str]] = ([], [])
    for index, paragraph in enumerate(paragraphs):
        parts[index // GROUP % 10 == 9].append(paragraph)
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


@cache
def text_bytes() -> Part:
    """The manual in UTF-8, a token per byte."""
    return Part(*(torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8).long() for part in text()))


@cache
def text_tokens(vocabulary: int) -> Part:
    """The manual in byte pairs, learnt from its training part; token MASK never occurs in it."""
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["[MASK]"], show_progress=False
    )
    encoder.train_from_iterator([text()[0]], trainer)
    return Part(*(torch.tensor(encoder.encode(part).ids) for part in text()))


@cache
def drawings(side: int, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Every character of every font, DRAWINGS times: uint8 [n, side, side], white on black, and int64 [n]."""
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    generator = np.random.default_rng(0)
    images, labels = [], []
    for font_index, font in enumerate(FONTS):
        sizes = [ImageFont.truetype(str(folder / font), round(side * share)) for share in (0.6, 0.7, 0.8)]
        for index, character in enumerate(CHARACTERS):
            chosen = (font_index + index) % 8 == 7  # every character, in two or three fonts
            for number in range(DRAWINGS):
                angle, *offset = generator.uniform((-12, -2, -2), (12, 2, 2))
                if chosen == held_out:
                    images.append(_draw(character, sizes[number % len(sizes)], side, angle, offset))
                    labels.append(index)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def _draw(character: str, font: ImageFont.FreeTypeFont, side: int, angle: float, offset: list[float]) -> np.ndarray:
    image = Image.new("L", (side, side))
    place = side / 2 + offset[0], side / 2 + offset[1]
    ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="mm")
    return np.asarray(image.rotate(angle, Image.Resampling.BILINEAR))


def _pixels(images: torch.Tensor) -> torch.Tensor:
    return images.unsqueeze(1).float() / 127.5 - 0.5


def _windows(tokens: torch.Tensor, generator: np.random.Generator, size: int, length: int) -> torch.Tensor:
    starts = generator.integers(len(tokens) - length + 1, size=size)
    return torch.stack([tokens[start : start + length] for start in starts])


def _cut(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return tokens[: HELD_OUT_WINDOWS * length].view(HELD_OUT_WINDOWS, length)
