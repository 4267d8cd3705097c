"""The modes of feedback against the equations of their papers, written once more in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_codecs import Largest

from espresso_ds.compressors.registry import make
from espresso_ds.core.config import CompressorSettings
from espresso_ds.feedback import Feedback

TOPK = make(CompressorSettings(name="topk", density=0.05))
NUMEL, K = 1000, 50


def gradients(steps: int, numel: int = NUMEL, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, numel)).astype(np.float32)


def encode(memory, codec, x, site="w", seed=0, **more) -> torch.Tensor:
    """The payload of one step."""
    payload = torch.empty(codec.payload_nbytes(len(x)), dtype=torch.uint8)
    memory.encode(codec, torch.as_tensor(x), payload, seed, site, **more)
    return payload


def decode(codec, payloads, numel, seed=0) -> torch.Tensor:
    out = torch.zeros(numel)
    for payload in payloads:
        codec.decode_add(payload, out, seed)
    return out


def kept(memory, site="w", name="residual") -> np.ndarray:
    return memory.state_dict()["sites"][site][name].numpy()


def test_ef_signsgd_is_algorithm_1_of_its_paper():
    """Karimireddy et al. 2019: p = gamma g + e; delta = |p|_1 / d sign(p); e = p - delta; in blocks of 4096, as their layers."""
    codec, memory, gamma, numel = make(CompressorSettings(name="efsignsgd")), Feedback("ef"), 0.1, 3 * 4096 + 17
    error = np.zeros(numel, np.float64)
    for gradient in gradients(20, numel):
        out = decode(codec, [encode(memory, codec, np.float32(gamma) * gradient)], numel).numpy()
        p = np.float32(gamma) * gradient + error
        blocks = np.split(p, range(4096, numel, 4096))
        delta = np.concatenate([np.abs(block).mean() * np.sign(block) for block in blocks])
        error = p - delta
        np.testing.assert_allclose(out, delta, rtol=2e-5)
        np.testing.assert_allclose(kept(memory), error, rtol=0, atol=1e-5)
        error = kept(memory).astype(np.float64)  # or a p next to zero could once get another sign


@pytest.mark.parametrize("codec", [pytest.param(Largest(K), id="plain"), pytest.param(TOPK, id="topk")])
@pytest.mark.parametrize("clip", (None, 20.0))
def test_dgc_is_algorithm_4_of_its_paper(codec, clip):
    """Lin et al. 2018: G = clip(g, N**-1/2 thr); u = m u + G; v += u; send v where |v| is in the top s%, and there v = u = 0.

    Where values are rounded on the wire, what rounding drops stays in v.
    """
    world, momentum = 4, 0.7
    memory = Feedback("dgc", momentum=momentum, clip=clip, world_size=world)
    u, v = np.zeros(NUMEL, np.float32), np.zeros(NUMEL, np.float32)
    clipped = 0
    for step, gradient in enumerate(gradients(30) * np.linspace(0.1, 2.0, 30, dtype=np.float32)[:, None]):
        out = decode(codec, [encode(memory, codec, gradient)], NUMEL).numpy()
        norm = np.linalg.norm(gradient.astype(np.float64))
        factor = np.float32(1.0)
        if clip is not None and norm > clip / math.sqrt(world):
            factor, clipped = np.float32(clip / math.sqrt(world) / norm), clipped + 1
        u = np.float32(momentum) * u + factor * gradient
        v = v + u
        mask = np.abs(v) >= np.sort(np.abs(v))[-K]
        assert mask.sum() == K and np.array_equal(out != 0, mask), step
        np.testing.assert_allclose(out[mask], v[mask], rtol=2**-8 if codec is TOPK else 1e-5)
        v, u = np.where(mask, v - out, v), np.where(mask, 0, u)
        np.testing.assert_allclose(kept(memory, name="velocity"), u, rtol=0, atol=1e-5)
        np.testing.assert_allclose(kept(memory), v, rtol=0, atol=1e-4)
        u, v = kept(memory, name="velocity").copy(), kept(memory).copy()  # or equal neighbours could once trade places
    assert clip is None or 0 < clipped < 30


def test_clipping_hides_nothing_however_large():
    """A norm that overflows fp32 still clips, and NaN and Inf stay what they are."""
    memory, codec = Feedback("dgc", clip=1.0), Largest(2)
    out = decode(codec, [encode(memory, codec, np.float32([3e30, 4e30]))], 2)
    torch.testing.assert_close(out, torch.tensor([0.6, 0.8]))
    for bad in (math.nan, math.inf):
        out = decode(codec, [encode(Feedback("dgc", clip=1.0), codec, np.float32([bad, 4.0]))], 2)
        assert not out[0].isfinite() and out[1] == 4.0


def test_dgc_gives_momentum_once():
    """What is compressed again on its way is a sum of what had its momentum already: it gets error feedback."""
    dgc, ef, codec = Feedback("dgc", clip=0.1), Feedback("ef"), Largest(K)
    for gradient in gradients(5):
        assert torch.equal(encode(dgc, codec, gradient, recompressed=True), encode(ef, codec, gradient))
    assert list(dgc.state_dict()["sites"]["w"]) == ["residual"]


CODECS = {
    "plain": Largest(K),
    "topk": TOPK,
    "randomk": make(CompressorSettings(name="randomk", density=0.05)),
    **{name: make(CompressorSettings(name=name)) for name in ("efsignsgd", "quantize", "fp16")},
}


@pytest.mark.parametrize("name", CODECS)
def test_ef21_is_algorithm_2_of_its_paper(name):
    """Richtarik et al. 2021: c_i = C(g_i - h_i); h_i += c_i; H = sum h_i. One sender: the same bits on both sides; three: the
    sum, up to the rounding of 60 sums of three."""
    codec, steps = CODECS[name], 60
    alone, memory = Feedback("ef21"), Feedback("ef21", reversible=True)
    given = np.stack(
        [gradients(1, seed=sender).repeat(steps, 0) + 0.1 * gradients(steps, seed=9 + sender) for sender in range(3)]
    )
    largest = 0.0
    for step in range(steps):
        before = memory.state_dict()["sites"] if step else {}
        held = [before[f"w{s}"]["estimate"].numpy().copy() if step else np.zeros(NUMEL, np.float32) for s in range(3)]
        payloads = [encode(memory, codec, given[sender, step], f"w{sender}", step) for sender in range(3)]
        out = decode(codec, payloads, NUMEL, step)
        memory.decoded(out, "out")
        memory.commit()
        for sender, payload in enumerate(payloads):
            change = torch.empty_like(payload)
            codec.encode(torch.from_numpy(given[sender, step] - held[sender]), change, step)
            assert torch.equal(payload, change)
            assert np.array_equal(
                kept(memory, f"w{sender}", "estimate"), held[sender] + decode(codec, [payload], NUMEL, step).numpy()
            )
        exact = sum(kept(memory, f"w{sender}", "estimate").astype(np.float64) for sender in range(3))
        largest = max(largest, np.abs(exact).max())
        assert np.array_equal(out.numpy(), kept(memory, "out", "estimate"))
        assert np.abs(out.numpy() - exact).max() <= (step + 1) * 6 * 2**-24 * largest

        single = decode(codec, [encode(alone, codec, given[0, step], seed=step)], NUMEL, step)
        alone.decoded(single, "out")
        assert np.array_equal(kept(alone, "out", "estimate"), kept(alone, "w", "estimate"))
    first, last = np.linalg.norm(given[0, 0]), np.linalg.norm(single.numpy() - given[0, -1])
    assert last < 0.5 * first, "the estimate follows the gradient"


@pytest.mark.parametrize(
    "codec", [pytest.param(Largest(1), id="plain"), pytest.param(make(CompressorSettings(name="topk", density=0.3)), id="topk")]
)
def test_ef21_converges_where_topk_alone_diverges(codec):
    """Beznosikov et al., "On Biased Compression for Distributed Learning", 2020, example 1: f_i(x) = <a_i, x>**2 + |x|**2 / 4."""
    a = np.float32([[-3, 2, 2], [2, -3, 2], [2, 2, -3]])

    def descend(mode: str) -> float:
        memory, x = Feedback(mode), np.ones(3, np.float32)
        for _ in range(1500):
            slopes = 2 * (a @ x)[:, None] * a + x / 2
            out = decode(codec, [encode(memory, codec, slopes[sender], str(sender)) for sender in range(3)], 3)
            memory.decoded(out, "out")
            x = x - np.float32(0.01 / 3) * out.numpy()
            if np.linalg.norm(x) > 1e6:
                break
        return float(np.linalg.norm(x))

    assert descend("none") > 1e6
    assert descend("ef21") < 1e-2
