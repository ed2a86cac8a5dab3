"""Bytes that a coverage-guided fuzzer has found worth keeping are answered or refused as they should be.

``python -m benchmarks.hostile_bytes`` finds them, where atheris is installed. What it finds wrong is added to the
corpus with the change that mends it.
"""

from __future__ import annotations

import logging

import pytest
from fuzz_targets import TARGETS, lines_of, seeds


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("torchsurgeon").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("target", TARGETS)
def test_every_text_of_the_corpus_is_answered_or_refused(target: str) -> None:
    corpus = lines_of(target)
    assert len(corpus) >= 20
    for data in corpus:
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_of_the_corpus_are_taken(target: str) -> None:
    for data in seeds(target):
        TARGETS[target](data)
