"""The 1F1B simulator: closed form, bounds, dependencies, a schedule drawn by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from workbench.config import ConfigError
from workbench.simulation import Origin, imbalance, mean_load, one_forward_one_backward, waiting_share


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 1), (1, 5), (2, 1), (4, 2), (4, 4), (4, 16), (8, 3)])
def test_equal_micro_batches_take_the_closed_form(stages: int, micro_batches: int) -> None:
    """(m + p - 1)(f + b), and the bubble (p - 1) / (m + p - 1)."""
    shape = (stages, micro_batches)
    timeline = one_forward_one_backward(np.full(shape, 1.0), np.full(shape, 2.0))
    slots = micro_batches + stages - 1
    assert timeline.seconds == pytest.approx(slots * 3)
    assert timeline.bubble == pytest.approx((stages - 1) / slots)


def test_no_step_is_faster_than_the_mean_load_or_the_longest_path() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        shape = (int(generator.integers(1, 6)), int(generator.integers(1, 9)))
        forward, backward = generator.exponential(size=shape), generator.exponential(size=shape)
        timeline = one_forward_one_backward(forward, backward, transfer=float(generator.random() * 0.1))
        assert timeline.seconds >= mean_load(forward, backward) - 1e-12
        assert timeline.seconds >= timeline.busy_S.max() - 1e-12
        assert timeline.seconds >= (forward + backward).sum(axis=0).max() - 1e-12


def test_every_pass_runs_once_when_its_stage_is_free_and_its_input_is_there() -> None:
    generator = np.random.default_rng(1)
    S, M, transfer = 4, 6, 0.05
    timeline = one_forward_one_backward(generator.random((S, M)), generator.random((S, M)), transfer)
    by_pass = {(event.kind, event.stage, event.micro_batch): event for event in timeline.events}
    assert len(by_pass) == len(timeline.events) == 2 * S * M
    for (kind, stage, number), event in by_pass.items():
        before = stage - 1 if kind == "forward" else stage + 1
        if 0 <= before < S:
            assert event.start >= by_pass[kind, before, number].end + transfer - 1e-12
        if kind == "backward":
            assert event.start >= by_pass["forward", stage, number].end - 1e-12
    for stage in range(S):
        events = [event for event in timeline.events if event.stage == stage]
        assert all(later.start >= earlier.end - 1e-12 for earlier, later in itertools.pairwise(events))
        in_flight = np.cumsum([1 if event.kind == "forward" else -1 for event in events])
        assert in_flight.max() <= S - stage, "1F1B stores at most S - s activations"


def test_a_schedule_by_hand() -> None:
    """Two stages, a long and a short micro-batch: stage 0 runs F0 0–2, F1 2–3, B0 6–8 and B1 8–9; stage 1 runs F0
    2–4, B0 4–6, F1 6–7, B1 7–8."""
    timeline = one_forward_one_backward(np.array([[2, 1], [2, 1]]), np.array([[2, 1], [2, 1]]))
    ends = {(event.kind[0], event.stage, event.micro_batch): event.end for event in timeline.events}
    assert ends == {
        ("f", 0, 0): 2,
        ("f", 0, 1): 3,
        ("b", 0, 0): 8,
        ("b", 0, 1): 9,
        ("f", 1, 0): 4,
        ("b", 1, 0): 6,
        ("f", 1, 1): 7,
        ("b", 1, 1): 8,
    }


def test_imbalance_and_waiting_by_hand() -> None:
    seconds = np.array([[1.0, 2.0], [3.0, 6.0]])
    assert imbalance(seconds) == pytest.approx(4 / 3), "means 2 and 4 over ranks"
    assert waiting_share(seconds) == pytest.approx(1 - 6 / 9)


def test_arrays_of_different_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 3\)"):
        one_forward_one_backward(np.ones((2, 3)), np.ones((3, 2)))


def test_origins_are_plain_words() -> None:
    assert [str(origin) for origin in Origin] == ["simulated", "replayed", "real"]
