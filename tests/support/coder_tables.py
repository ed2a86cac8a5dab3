"""Tables of the entropy coder that no sample was fitted with.

``random_tables``   tables with every edge that the rules allow
"""

from __future__ import annotations

import numpy

from torchsurgeon.codec.range_tables import LEVELS, TOTAL, CoderTables


def random_tables(rng: numpy.random.Generator, groups: int, parents: int, symbols: int) -> CoderTables:
    """Tables that no sample was fitted with, with every edge that the rules allow."""
    rows, tables = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    inner = [numpy.sort(rng.choice(numpy.arange(1, TOTAL), symbols - 1, replace=False)) for _ in range(rows)]
    if rng.integers(2):
        inner[0] = numpy.arange(TOTAL - symbols + 1, TOTAL)
    earlier = numpy.arange(groups)[:, None] * numpy.ones((1, parents), int)
    return CoderTables(
        cumulative=numpy.array([[0, *row, TOTAL] for row in inner], numpy.uint16),
        escape_bits=rng.integers(0, 17, rows).astype(numpy.uint8),
        row_of=rng.integers(0, rows, (tables, LEVELS)).astype(numpy.uint8),
        table_of=rng.integers(0, tables, groups).astype(numpy.uint16),
        parents=(rng.integers(0, earlier + 1) - 1).astype(numpy.int32),
        weights=rng.integers(0, 130, (groups, 6 + parents)).astype(numpy.uint8),
        bias=rng.integers(0, 8000, groups).astype(numpy.uint16),
    )
