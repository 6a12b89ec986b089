"""Fixtures that several test files share."""

import pytest
import torch

from consistency.randomness import BatchRandom


@pytest.fixture
def draws():
    """draws(total, seed, start, stop): the random numbers of a step, as the loop makes them."""

    def make(total, seed=0, start=0, stop=None):
        generator = torch.Generator().manual_seed(seed)
        return BatchRandom(generator, total, start, total if stop is None else stop)

    return make
