"""The noise levels of diffusers' CMStochasticIterativeScheduler: a grid, chosen from by index.

Level i of N = num_train_timesteps is (a + i / (N - 1) (b - a))^rho with a = sigma_max^(1/rho) and
b = sigma_min^(1/rho): Karras' grid from the top. `timesteps=[j, 0]` are the levels 0 and j, and
`num_inference_steps=n` the multiples of N // n. So how far a model's own levels can be had there is
a question of N, which says nothing about the model itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

COARSEST, FINEST = 4096, 100_801  # levels of a grid: to hold one exactly, and at the most
MIDDLE = 22 / 39  # where the published two-step samples of ImageNet-64 pass


@dataclass(frozen=True)
class Levels:
    """The grid of one scheduler."""

    count: int  # num_train_timesteps, at least 2
    sigma_min: float
    sigma_max: float
    rho: float

    def sigma(self, index: int) -> float:
        top, bottom = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return float((top + index / (self.count - 1) * (bottom - top)) ** self.rho)

    def position(self, sigma: float) -> float:
        """Where a level lies: 0 at sigma_max, count - 1 at sigma_min."""
        top, bottom = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return float((self.count - 1) * (top - sigma ** (1 / self.rho)) / (top - bottom))

    def nearest(self, sigmas: Sequence[float], lowest: float = 0.0) -> list[int] | None:
        """`timesteps` closest to descending levels, none below `lowest`; None: grid too coarse."""
        found = [min(self.count - 1, max(0, round(self.position(sigma)))) for sigma in sigmas]
        found = [index - (index > 0 and self.sigma(index) < lowest) for index in found]
        return found[::-1] if len(set(found)) == len(found) else None

    @property
    def middle(self) -> float:
        """A level of the middle that no coarser grid has; `fitting` finds the grid from it."""
        last = self.count - 1
        wanted = MIDDLE * last
        return self.sigma(
            min((j for j in range(last + 1) if gcd(j, last) == 1), key=lambda j: abs(j - wanted))
        )


def fitting(sigma: float, sigma_min: float, sigma_max: float, rho: float) -> Levels:
    """The grid with a level `sigma`: the coarsest that has it, else a fine one that comes closest.

    A fine one has 24 m + 1 levels: there `num_inference_steps=n` for n = 3, 4, 6, 8, 12 takes every
    n-th part of it exactly, as our own samplers do. The level is then off by 1e-7 of itself: what
    the network is told of it (250 ln sigma) must not differ by more than its float32.
    """

    def levels(count: int) -> Levels:
        return Levels(count, sigma_min, sigma_max, rho)

    def miss(count: int) -> float:
        position = levels(count).position(sigma)
        return abs(position - round(position))

    for count in range(2, COARSEST):
        if miss(count) < 1e-9 and 0 < levels(count).position(sigma) <= count - 1:
            return levels(count)
    return levels(min(range(2521, FINEST + 1, 24), key=lambda count: miss(count) / count))
