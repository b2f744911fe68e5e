"""What the compiled core leaves is what Python leaves, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from tests.compiled.twins import CONFIG, Twins
from tests.core import pools

STEPS = 500


@pytest.mark.parametrize("fit", ["next fit", "first fit"])
@pytest.mark.parametrize("seed", range(8))
def test_after_each_of_thousands_of_calls_the_bytes_are_the_same(
    seed: int, fit: str, new_pool_name: Callable[[], str]
) -> None:
    config = msgspec.structs.replace(CONFIG, allocation=fit)
    with (
        pools.create(new_pool_name(), config) as compiled,
        pools.create(new_pool_name(), config) as plain,
        pools.create(new_pool_name(), config) as mixed,
    ):
        twins = Twins([compiled, plain, mixed], random.Random(seed))
        for _ in range(STEPS):
            twins.step()
        twins.end()
