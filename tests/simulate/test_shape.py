"""Shapes of random times have a mean of 1 and the spread that they say, and wrong ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from torchsurgeon.errors import SimulationError
from torchsurgeon.simulate import SHAPES, Shape


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_drawn_has_a_mean_of_one_and_the_spread_that_the_shape_says(name: str) -> None:
    shape = SHAPES[name]
    drawn = shape.draw(np.random.default_rng(1), 2_000_000)
    assert drawn.min() >= 0
    assert drawn.mean() == pytest.approx(1, abs=0.005)
    assert drawn.std() == pytest.approx(shape.variation, abs=0.03)


def test_the_web_search_shapes_spread_as_their_source_says() -> None:
    """The issue's own figures: coefficients of variation of 1.19 between arrivals and 1.15 of service."""
    assert SHAPES["web-search-arrivals"].variation == pytest.approx(1.19, abs=0.02)
    assert SHAPES["web-search-service"].variation == pytest.approx(1.15, abs=0.03)
    assert all("BigHouse" in SHAPES[name].source for name in ("web-search-arrivals", "web-search-service"))


def test_a_uniform_distribution_has_the_variation_that_a_textbook_gives() -> None:
    shape = Shape.of_quantiles("uniform", [0, 1], [0, 7.0])
    assert shape.variation == pytest.approx(1 / np.sqrt(3))
    assert shape.quantile(np.array([0.0, 0.5, 0.75])) == pytest.approx([0, 1, 1.5])


@pytest.mark.parametrize(
    ("probabilities", "values", "message"),
    [
        ([0, 1], [1.0], "2 probabilities and 1 values"),
        ([0.1, 1], [1.0, 2.0], "must rise from 0 to 1"),
        ([0, 0, 1], [1.0, 2.0, 3.0], "must rise from 0 to 1"),
        ([0, 1], [2.0, 1.0], "not falling"),
        ([0, 1], [-1.0, 1.0], "zero or more"),
        ([0, 1], [0.0, 0.0], "not all zero"),
        ([0, 1], [0.0, float("nan")], "zero or more"),
        ([0, 1], ["a", "b"], "must be numbers"),
    ],
)
def test_wrong_quantiles_are_refused(probabilities: list[float], values: list[float], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        Shape.of_quantiles("mine", probabilities, values)


def test_an_unknown_name_is_answered_by_those_that_there_are() -> None:
    with pytest.raises(SimulationError, match=r"'normal'.*exponential, constant"):
        Shape.named("normal")
