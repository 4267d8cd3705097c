"""The race's models and data: sizes, batches that ranks can rely on, nothing held out in training, and that all of them learn."""

import re

import numpy as np
import pytest
import torch

from benchmarks.race import data
from benchmarks.race.models import MODELS

PARAMETERS = {"gpt2-5m": 4_837_376, "gpt2-30m": 29_788_160, "minilm": 22_744_506, "vgg": 24_030_142}
NAMES = sorted(PARAMETERS)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def steps(workload, model, count, world=1):
    """Train on the mean of `world` ranks' gradients; the training losses."""
    optimizer, losses = workload.optimizer(model.parameters()), []
    for step in range(count):
        for rank in range(world):
            loss = model(workload.batch(rank, step, seed=0)) / world
            loss.backward()
        losses.append(loss.item() * world)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_their_share_in_one_layer(name):
    with torch.device("meta"):
        model = MODELS[name].network(**MODELS[name].shape)
    sizes = [param.numel() for param in model.parameters()]
    assert sum(sizes) == PARAMETERS[name]
    share = max(sizes) / sum(sizes)
    assert share > {"vgg": 0.8, "minilm": 0.5}.get(name, 0) and (share < 0.1 or name in ("vgg", "minilm"))


def test_there_are_no_others():
    assert sorted(MODELS) == NAMES and all(name == workload.name for name, workload in MODELS.items())


@pytest.mark.parametrize("name", NAMES)
def test_batches_depend_on_rank_step_and_seed_alone(name):
    workload = MODELS[name]
    first = workload.batch(0, 0, 0)
    torch.manual_seed(7)
    np.random.seed(7)
    workload.batch(3, 5, 0)
    assert equal(first, workload.batch(0, 0, 0))
    places = [(rank, step, seed) for rank in range(4) for step in range(6) for seed in range(2)]
    seen = {tuple(tensor.numpy().tobytes() for tensor in workload.batch(*place)) for place in places}
    assert len(seen) == len(places)
    assert {len(tensor) for tensor in first} == {workload.batch_size}


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_seed_alone(name):
    tiny = MODELS[name].tiny()
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    some = weights(tiny.build(0))
    assert torch.equal(torch.rand(2), drawn), "torch's generator was used"
    assert equal(some, weights(tiny.build(0)))
    assert not equal(some, weights(tiny.build(1)))


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_two_runs_are_the_same_to_the_bit(name):
    """Held-out text and drawings: better than at the start and than a guess from how often each answer occurs, if only that."""
    tiny = MODELS[name].tiny()
    model, again = tiny.build(0), tiny.build(0)
    before = tiny.eval_loss(model)
    losses = steps(tiny, model, 60)
    after = tiny.eval_loss(model)
    assert after < 0.9 * before
    assert steps(tiny, again, 60) == losses and tiny.eval_loss(again) == after
    for param in model.parameters():
        assert param.grad is None and param.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient(name):
    """DDP waits for ever for one that has none."""
    tiny = MODELS[name].tiny()
    model = tiny.build(0)
    model(tiny.batch(0, 0, 0)).backward()
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_leaves_mode_and_weights(name):
    tiny = MODELS[name].tiny()
    model = tiny.build(0)
    before = weights(model)
    assert tiny.eval_loss(model) == tiny.eval_loss(model)
    assert model.training and equal(before, weights(model))
    model.eval()
    tiny.eval_loss(model)
    assert not model.training


def test_the_learning_rate_rises_for_some_steps_and_then_stays():
    tiny = MODELS["vgg"].tiny()
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = tiny.optimizer([parameter])
    seen = []
    for _ in range(tiny.warm_up_steps + 5):
        parameter.grad = torch.ones(1)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])
    rising = [tiny.lr * step / tiny.warm_up_steps for step in range(1, tiny.warm_up_steps + 1)]
    assert seen == pytest.approx(rising + [tiny.lr] * 5)


@pytest.mark.parametrize("name", NAMES)
def test_one_value_of_state_for_a_weight(name):
    tiny = MODELS[name].tiny()
    model = tiny.build(0)
    optimizer = tiny.optimizer(model.parameters())
    model(tiny.batch(0, 0, 0)).backward()
    optimizer.step()
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert held == sum(param.numel() for param in model.parameters() if param.dim())


def test_no_held_out_paragraph_is_in_training():
    training, held_out = (set(re.split(r"\n\n", part)) for part in data.text())
    assert not training & held_out
    assert 0.05 < len(held_out) / (len(training) + len(held_out)) < 0.15
    assert len(data.text_bytes().held_out) >= data.HELD_OUT_WINDOWS * 128


def test_no_held_out_drawing_is_in_training():
    (some, labels), (others, other_labels) = (data.drawings(32, held_out) for held_out in (False, True))
    pairs = len(data.FONTS) * len(data.CHARACTERS)
    assert len(some) + len(others) == pairs * data.DRAWINGS
    assert not {image.numpy().tobytes() for image in some} & {image.numpy().tobytes() for image in others}
    assert set(labels.tolist()) == set(range(len(data.CHARACTERS)))
    assert set(other_labels.bincount(minlength=len(data.CHARACTERS)).tolist()) == {2 * data.DRAWINGS, 3 * data.DRAWINGS}
    assert some.flatten(1).amax(1).min() > 100, "a character is missing in a font"


def test_masked_tokens_can_be_put_back():
    source = data.MaskedTokens(length=32, vocabulary=512)
    tokens, places, labels = source.batch(np.random.default_rng(0), 3)
    assert (tokens == data.MASK).sum(1).tolist() == [round(0.15 * 32)] * 3
    whole = tokens.scatter(1, places, labels)
    assert not (whole == data.MASK).any() and whole.max() < 512
    training = data.text_tokens(512).training.unfold(0, 32, 1)
    for row in whole:
        assert (training == row).all(1).any(), "not a window of the text"


def test_bytes_are_those_of_the_text():
    (window,) = data.NextByte(64).batch(np.random.default_rng(1), 1)
    assert bytes(window[0].tolist()).decode(errors="replace").strip("\N{REPLACEMENT CHARACTER}") in data.text()[0]
