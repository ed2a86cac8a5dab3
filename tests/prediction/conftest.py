"""What the tests of predictors share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchsurgeon.prediction.regression import FORMS


class _Few(dict[str, object]):
    """Of all the forms, which a file may hold, those are tried that take a tenth of the time of boosted trees."""

    def __iter__(self) -> Iterator[str]:
        return iter(("linear", "log-linear", "forest"))


@pytest.fixture(scope="module")
def few_forms() -> Iterator[None]:
    """Choose among the forms that are quick to fit, where a test is about what is done with a predictor.

    That the best of all forms is chosen is tested with all of them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchsurgeon.prediction.regression.FORMS", _Few(FORMS))
        yield
