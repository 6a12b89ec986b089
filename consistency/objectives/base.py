"""The contract between the loop and an objective."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from consistency.data import Batch
from consistency.randomness import BatchRandom

Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, sigma, labels) -> image


@dataclass(frozen=True)
class Nets:
    """The networks of a step, each as a function (x [b,C,H,W], sigma [b], labels) -> image.

    `online` carries gradients (through DDP when there is one); `detached` is the same weights
    without DDP's hooks, for passes under no_grad.
    """

    online: Function
    detached: Function
    target: Function | None = None
    teacher: Function | None = None


@dataclass(frozen=True)
class Progress:
    """Images seen k of a budget of K, over all workers; every schedule is a function of it."""

    images: int
    total: int


@dataclass(frozen=True)
class LossTerms:
    """`per_sample` [b] float32 (weights included), the noise levels, and plain numbers to log."""

    per_sample: Tensor
    sigma: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A frozen value: same inputs, same loss."""

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms: ...

    def target_decay(self, progress: Progress) -> float | None:
        """mu of the target network after this step; None when there is no target network."""
        ...
