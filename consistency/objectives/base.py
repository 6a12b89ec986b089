"""The contract between the loop and an objective."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from consistency.data import Batch
from consistency.randomness import BatchRandom

Function = Callable[..., Tensor]
"""What an objective trains, as `Objective.function` wraps it: D or f (x, sigma, labels), TrigFlow's
F (u, c_noise, labels), MeanFlow's u (z, t, t_minus_r, labels)."""


@dataclass(frozen=True)
class Nets:
    """The networks of a step, each as the objective wraps it.

    `online` carries gradients (through DDP when there is one); `weighted(sigma, *inputs)` is the
    same call and u(sigma) [b] of the loss-weight head beside it; `detached` is the same weights
    without DDP's hooks, for passes under no_grad.
    """

    online: Function
    detached: Function
    target: Function | None = None
    teacher: Function | None = None
    weighted: Callable[..., tuple[Tensor, Tensor]] | None = None


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
    """A frozen value: same inputs, same loss. The loop asks it everything a method decides."""

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms: ...

    def function(self, net: nn.Module) -> nn.Module:
        """What is trained, around the inner network F: the denoiser D, f, ..."""
        ...

    def teacher_function(self, net: nn.Module) -> Function:
        """What the frozen teacher answers, around its inner network."""
        ...

    def target_decay(self, progress: Progress) -> float | None:
        """mu of the target network after this step; None when there is no target network."""
        ...

    def loss_weight(self) -> nn.Module | None:
        """A fresh head u(sigma) [b] -> [b] to be trained along (`weighting`), or None."""
        ...


def column(per_sample: Tensor) -> Tensor:
    """[b] -> [b, 1, 1, 1], to multiply images sample by sample."""
    return per_sample.view(-1, 1, 1, 1)
