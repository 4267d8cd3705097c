"""The codec profile: complete, ordered, in a file and back. How fast anything is, is not asserted."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from espresso_ds.compressors.registry import CODECS, make, resolve
from espresso_ds.core.config import CompressorSettings
from espresso_ds.core.errors import FileError
from espresso_ds.core.option import Device
from espresso_ds.core.profile import CompressorProfile
from espresso_ds.profiler import compressors
from espresso_ds.profiler.compressors import geometric_sizes, measure_contention, nondecreasing, profile_compressors
from espresso_ds.profiler.crowding import crowding, in_the_mean


@pytest.fixture(autouse=True)
def _short_phases(monkeypatch):
    monkeypatch.setattr(compressors, "_PHASE_S", 0.02)
    monkeypatch.setattr(compressors, "_CONTENTION_PHASE_S", 0.02)
    monkeypatch.setattr(compressors, "_POOL", 1 << 18)


@pytest.mark.parametrize("name", CODECS)
def test_profile_of_every_codec(name, tmp_path):
    settings = CompressorSettings(name=name)
    heard = []
    profile = profile_compressors([settings], (70_000, 1, 300), repeats=2, progress=lambda *news: heard.append(news))
    (profiled,) = profile.codecs
    (cpu,) = profiled.devices
    codec = make(settings)
    assert profiled.compressor == resolve(settings) and profiled.summable is (codec.sum_dtype is not None)
    assert cpu.device is Device.CPU and cpu.numel == (1, 300, 70_000)
    assert cpu.payload_nbytes == tuple(map(codec.payload_nbytes, cpu.numel))
    for seconds in (cpu.encode_s, cpu.decode_s):
        assert len(seconds) == 3 and seconds[0] > 0 and list(seconds) == sorted(seconds)
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert all(name in what for _, what in heard)
    profile.save(tmp_path / "codec.json")
    assert CompressorProfile.load(tmp_path / "codec.json") == profile


def test_every_timed_call_is_the_runtimes(monkeypatch):
    """Each size: one untimed encoding per tensor and `repeats` timed ones, with feedback, each with another tensor."""
    calls = []

    class Recorder(compressors.Feedback):
        def encode(self, codec, x, payload, seed, site):
            calls.append((len(x), x.data_ptr(), self.mode))
            super().encode(codec, x, payload, seed, site)

    monkeypatch.setattr(compressors, "Feedback", Recorder)
    monkeypatch.setattr(compressors, "measure_contention", lambda *_: 0.25)
    profile = profile_compressors([CompressorSettings(name="fp16")], sizes=(1000, 1 << 18), repeats=4)
    small = [place for numel, place, _ in calls if numel == 1000]
    assert len(small) == 8 and len(set(small[4:])) == 4, "every timed call reads another tensor"
    assert [numel for numel, _, _ in calls].count(1 << 18) == 1 + 4
    assert {mode for _, _, mode in calls} == {"ef"}
    assert profile.codecs[0].devices[0].contention == 0.25


def test_contention_of_ranks_that_keep_step():
    """Two ranks as threads: every phase starts together, the result is a number, and torch's threads are as they were."""
    meeting, results, before = threading.Barrier(2, timeout=60), {}, torch.get_num_threads()

    def rank(number):
        results[number] = measure_contention(make(CompressorSettings(name="efsignsgd")), 1, meeting.wait)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(120)
    assert sorted(results) == [0, 1] and all(value >= 0 for value in results.values())
    assert torch.get_num_threads() == before


def test_a_codec_that_fails_in_the_background_is_heard(monkeypatch):
    class Failing(type(make(CompressorSettings(name="identity")))):
        def decode_sum(self, rows, out, seed):
            if threading.current_thread() is not threading.main_thread():
                raise ArithmeticError("from the background")
            super().decode_sum(rows, out, seed)

    before = torch.get_num_threads()
    with pytest.raises(ArithmeticError, match="from the background"):
        measure_contention(Failing(), 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "together, calls, expected",
    [(0.8, (0.01, 0.02), 1.0), (0.5, (0.01, 0.01), 0.2), (0.3, (0.01, 0.01), 0.0)],
    ids=["take turns on one core", "a fifth", "less than alone is noise"],
)
def test_contention_is_delay_per_second_of_codec_work(monkeypatch, together, calls, expected):
    """Computing takes 0.4 s alone; a call takes calls[0] alone and calls[1] beside computing, in the round in the middle."""
    rounds = [(9.0, 0.4), (0.1, 0.4), (together, 0.4)]  # the host stood still in the first one, beside; in the second, alone
    times, per_call = (seconds for each in rounds for seconds in (0.4, *each)), iter(3 * calls)
    monkeypatch.setattr(compressors, "calibrate", lambda device, seconds: 1)
    monkeypatch.setattr(compressors, "multiply", lambda products, device: next(times))
    monkeypatch.setattr(compressors, "_repeat", lambda call, device, enough: (10, next(per_call)))
    assert measure_contention(make(CompressorSettings(name="identity")), 1) == pytest.approx(expected)


def test_sizes():
    assert geometric_sizes() == tuple(4**i for i in range(4, 13))
    assert geometric_sizes(5000) == (256, 1024, 4096, 5000)
    assert geometric_sizes(4096) == (256, 1024, 4096)
    assert geometric_sizes(10) == (256,)
    assert geometric_sizes(2**40)[-1] == 2**24


def test_disturbed_times_are_lowered():
    assert nondecreasing((1.0, 9.0, 3.0, 2.0, 4.0)) == (1.0, 2.0, 2.0, 2.0, 4.0)


def test_short_calls_of_ranks_that_take_turns_count_in_the_mean():
    """Calls of 1 ms, of which every fourth waits 4 ms for another rank: 2 ms in the mean."""
    now, calls = [0.0], itertools.count(1)

    def call():
        now[0] += 0.005 if next(calls) % 4 == 0 else 0.001

    assert crowding(call, 0.2, lambda: now[0]) == pytest.approx(1.9, rel=0.02), "without the longest of 32"
    numel, medians = (100, 1000, 4000, 16000), (0.2, 1.0, 5.0, 40.0)
    assert in_the_mean(numel, medians, 2.0, 1000) == (0.2, 2.0, 8.0, 40.0), "a call's own overhead once, long calls saw it all"
    assert in_the_mean(numel, medians, 1.0, 1000) == medians


def test_a_disturbed_call_is_no_crowd():
    now, calls = [0.0], itertools.count(1)

    def call():
        now[0] += 0.3 if next(calls) == 2 else 0.001

    assert crowding(call, 0.2, lambda: now[0]) == 1.0


def test_what_cannot_be_profiled():
    with pytest.raises(FileError, match="unknown codec"):
        profile_compressors([CompressorSettings(), CompressorSettings(name="nope")], progress=lambda *news: pytest.fail("began"))
    with pytest.raises(ValueError, match="must be positive"):
        profile_compressors([CompressorSettings()], sizes=(0, 5))
    with pytest.raises(ValueError, match="0 codecs"):
        profile_compressors([])
