"""Hiding classes, so that one network learns the conditional and the unconditional model."""

import torch
from torch import Tensor

from consistency.randomness import BatchRandom


def drop_labels(labels: Tensor | None, share: float, random: BatchRandom) -> Tensor | None:
    """Labels [b] with each one replaced by -1, the null class, with probability `share`."""
    if labels is None or share == 0:
        return labels
    return torch.where(random.uniform() < share, -1, labels)
