"""Latency tables: the monotone projection, interpolation, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from workbench.config import ConfigError
from workbench.latency import LatencyTable, LayerLatency, monotone

LAYER = LayerLatency((100, 200), (2, 4), ((1.0, 2.0), (3.0, 5.0)), {"mixer": {"kind": "moba"}})


def test_monotone_is_the_closest_matrix_that_falls_along_no_axis() -> None:
    """Against a general solver of the same quadratic programme."""
    values = np.random.default_rng(0).normal(size=(4, 3)).cumsum(0).cumsum(1)
    constraints = [
        {"type": "ineq", "fun": lambda x: np.diff(x.reshape(4, 3), axis=0).ravel()},
        {"type": "ineq", "fun": lambda x: np.diff(x.reshape(4, 3), axis=1).ravel()},
    ]
    solved = minimize(
        lambda x: ((x - values.ravel()) ** 2).sum(),
        np.zeros(12),
        constraints=constraints,
        options={"maxiter": 500, "ftol": 1e-14},
    )
    projected = monotone(values)
    assert all((np.diff(projected, axis=axis) >= 0).all() for axis in (0, 1))
    assert np.abs(projected.ravel() - solved.x).max() < 1e-5


def test_a_monotone_matrix_stays_as_it_is() -> None:
    values = np.arange(12.0).reshape(3, 4)
    assert (monotone(values) == values).all()


def test_times_are_interpolated_and_added_over_documents() -> None:
    assert LAYER.seconds_of(np.array([150]), 3) == pytest.approx((1.5 + 4) / 2)
    assert LAYER.seconds_of(np.array([100, 200]), 4) == pytest.approx(2 + 5)
    assert LAYER.seconds_of(np.array([50]), 2) == pytest.approx(0.5), "below the shortest, in proportion"


def test_times_are_those_of_numpys_interpolation() -> None:
    generator = np.random.default_rng(0)
    seconds = generator.random((3, 4)).cumsum(0).cumsum(1)
    layer = LayerLatency((10, 40, 100), (1, 2, 8, 9), tuple(map(tuple, seconds)))
    for blocks in (1, 1.5, 2, 7.3, 8, 9):
        of_lengths = [np.interp(blocks, layer.budgets, row) for row in seconds]
        for length in (3, 10, 25, 99, 100):
            expected = np.interp(length, (0, *layer.lengths), (0.0, *of_lengths))
            assert layer.seconds_of(np.array([length]), blocks) == pytest.approx(expected)
    assert LayerLatency((10,), (4,), ((2.0,),)).seconds_of(np.array([10]), 4) == 2


@pytest.mark.parametrize(("length", "blocks"), [(201, 2), (100, 1), (100, 5)])
def test_nothing_is_extrapolated(length: int, blocks: int) -> None:
    with pytest.raises(ConfigError, match="table"):
        LAYER.seconds_of(np.array([length]), blocks)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    dense = LayerLatency((100, 200), (), ((1.0,), (2.0,)))
    table = LatencyTable({"device": "one"}, {"a": LAYER, "b": dense}, ("a", "b", "a"), {"date": "today"})
    table.save(tmp_path / "table.json")
    read = LatencyTable.load(tmp_path / "table.json")
    assert read == table and read.fingerprint == table.fingerprint
    assert read.seconds(np.array([200]), [2, None, 4]) == pytest.approx(3 + 2 + 5)


def test_the_fingerprint_is_of_the_times_and_not_of_their_provenance() -> None:
    tables = [LatencyTable({"device": d}, {"a": LAYER}, ("a",), {"date": t}) for d, t in ("xa", "xb", "ya")]
    one, other_day, other_device = (table.fingerprint for table in tables)
    assert one == other_day != other_device


@pytest.mark.parametrize("text", [None, "{}", "[1", '{"format": 99}'])
def test_a_file_that_is_no_table_is_refused_with_the_command_that_makes_one(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"latency table|format 1"):
        LatencyTable.load(path)


def test_a_table_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 layers.*has 2"):
        LatencyTable({}, {"a": LAYER}, ("a",)).seconds(np.array([100]), [2, 2])
