"""The order of training images: a pure function of (seed, images seen), never of worker count.

The stream is an endless concatenation of epochs, each a permutation of the data set drawn from
(seed, epoch). The batch at position p is images [p, p + batch) of that stream.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.randomness import derive_seed
from consistency.sampling import from_uint8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """images float32 [b, C, H, W] in [-1, 1]; labels int64 [b], or None without classes."""

    images: Tensor
    labels: Tensor | None


@lru_cache(maxsize=2)
def epoch_permutation(count: int, seed: int, epoch: int) -> Array:
    """The order of epoch `epoch`, int64 [count]."""
    return np.random.default_rng(derive_seed(seed, "epoch", epoch)).permutation(count)


@dataclass(frozen=True)
class ImageStream:
    """Random access into the shuffled stream over uint8 images [N, H, W, C] (RAM or memmap)."""

    images: Array
    labels: Array | None
    seed: int
    flip: bool = False

    def indices(self, position: int, count: int) -> Array:
        """Data-set indices of stream positions [position, position + count), int64 [count]."""
        total = len(self.images)
        pieces = []
        while count > 0:
            epoch, offset = divmod(position, total)
            taken = epoch_permutation(total, self.seed, epoch)[offset : offset + count]
            pieces.append(taken)
            position, count = position + len(taken), count - len(taken)
        return np.concatenate(pieces)

    def batch(
        self, position: int, total: int, start: int, stop: int, device: torch.device
    ) -> Batch:
        """Rows [start, stop) of the global batch of `total` images at `position`."""
        chosen = self.indices(position, total)[start:stop]
        pixels = self.images[chosen]
        if self.flip:
            coins = np.random.default_rng(derive_seed(self.seed, "flip", position)).random(total)
            mirrored = coins[start:stop] < 0.5
            pixels[mirrored] = pixels[mirrored, :, ::-1].copy()
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen]).to(device)
        return Batch(from_uint8(torch.from_numpy(pixels)).to(device), labels)
