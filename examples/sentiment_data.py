"""Movie-review sentences with the sign of their mean human rating: 10,605 rated sentences (Hutto and Gilbert, ICWSM 2014).

They come inside the source distribution of the PyPI package vaderSentiment 3.3.2, an archive within an archive.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import torch
from torch.utils.data import TensorDataset
from transformers import PreTrainedTokenizerBase

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
HELD_OUT = 2000
SPLIT_SEED = 2014


def read_sentences(sdist: Path) -> list[tuple[str, int]]:
    """(sentence, label) in the order of the file; label 1 for a mean rating above zero, 0 below, none at zero.

    Raises:
        SystemExit: the archive is not there or holds no ratings.
    """
    try:
        with tarfile.open(sdist) as outer:
            inner = next((outer.extractfile(member) for member in outer if member.name.endswith(INNER)), None)
            if inner is None:
                raise SystemExit(f"{sdist}: holds no {INNER}; it should be the source distribution of vaderSentiment 3.3.2")
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                table = archive.extractfile(RATINGS)
                lines = table.read().decode("utf-8").splitlines() if table else []
    except FileNotFoundError:
        raise SystemExit(
            f"{sdist}: no such file; get it with `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`"
        ) from None
    rows = [line.split("\t", 2) for line in lines]
    return [(sentence.strip(), int(float(score) > 0)) for _, score, sentence in rows if float(score) != 0]


def load_split(sdist: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out sets of (input_ids, attention_mask, label); the split is the same in every run.

    Every sentence is cut or padded to `length` tokens, so that all batches cost the same. Shapes: (n, length) int64 twice,
    then (n,) int64.
    """
    sentences, labels = zip(*read_sentences(sdist), strict=True)
    tokens = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    columns = (tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))

    def subset(rows: torch.Tensor) -> TensorDataset:
        return TensorDataset(*(column[rows] for column in columns))

    return subset(order[HELD_OUT:]), subset(order[:HELD_OUT])
