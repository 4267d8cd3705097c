"""PowerSGD against torch's own DDP hook, with ranks as processes: the same gradients from the same first factors."""

import sys
from concurrent.futures import ThreadPoolExecutor

import jobs
import pytest
import torch

WORLD = 2
TOLERANCE = 1e-5
"""Of any element, relative to the largest of its step. Six steps of fp32 arithmetic, in another order of operations."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")

    def start(rank):
        script, files = jobs.TESTS / "scripts/powersgd_hook.py", (folder / "meeting", folder / f"{rank}.pt")
        done = jobs.run([sys.executable, script, rank, WORLD, *files], timeout=120, cwd=jobs.ROOT)
        assert done.returncode == 0, done.stdout[-3000:]
        return torch.load(files[1], weights_only=True)

    with ThreadPoolExecutor(WORLD) as threads:
        return list(threads.map(start, range(WORLD)))


@pytest.mark.parametrize("rank", (1, 2, 4))
def test_numbers_of_torchs_hook(results, rank):
    """The hook orthogonalises by Gram-Schmidt up to rank 2 and by QR above."""
    for result in results:
        theirs, ours = result[rank]["theirs"], result[rank]["ours"]
        assert theirs.shape == ours.shape == (6, 24 * 27 + 24 + 384 * 40 + 40 + 40 * 33 + 33)
        assert ((theirs - ours).abs().amax(1) <= TOLERANCE * theirs.abs().amax(1)).all()
        assert torch.equal(ours, results[0][rank]["ours"])


@pytest.mark.parametrize("rank", (1, 2, 4))
def test_the_gradients_were_compressed(results, rank):
    """What the hook makes of them is far from their mean, or the test above would say nothing."""
    mean = sum(result[rank]["inputs"] for result in results) / WORLD
    theirs = results[0][rank]["theirs"]
    assert ((theirs - mean).norm(dim=1) > 0.1 * mean.norm(dim=1)).all()
    assert {(40, 384), (33, 40), (24, 27)} == set(results[0][rank]["matrices"])
