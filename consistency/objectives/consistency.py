"""The discrete consistency loss as one composition of parts (CD, CT, iCT, ECT).

    lambda(t, r) d( f_theta(x_t, t), stopgrad f_theta-(x_r, r) )

Song et al. 2023, Algorithms 2 and 3; Song & Dhariwal 2023 (iCT); Geng et al. 2024 (ECT).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from consistency import distances
from consistency.config import (
    ConsistencyConfig,
    LognormalPairs,
    NoiseConfig,
    PairsConfig,
    TargetConfig,
    TargetEMA,
    UniformPairs,
)
from consistency.data import Batch
from consistency.objectives.base import LossTerms, Nets, Progress
from consistency.objectives.pairs import Pairs, draw_pairs, num_levels
from consistency.randomness import BatchRandom
from consistency.schedules import inverse_gap_weight, mu_adaptive
from consistency.solvers import euler_step, heun_step


@dataclass(frozen=True)
class ConsistencyObjective:
    """pairs x path x distance x weight x target rule."""

    noise: NoiseConfig
    pairs: PairsConfig
    path: Literal["heun", "euler", "noise"]
    distance: Literal["l1", "squared_l2", "pseudo_huber"]
    huber_c: float | None
    weight: Literal["uniform", "inverse_gap"]
    target: TargetConfig

    @classmethod
    def of(cls, config: ConsistencyConfig, noise: NoiseConfig) -> "ConsistencyObjective":
        return cls(
            noise,
            config.pairs,
            config.path,
            config.distance,
            config.huber_c,
            config.weight,
            config.target,
        )

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        pairs = draw_pairs(self.pairs, self.noise, progress, random)
        z = random.normal(*batch.images.shape[1:])
        x_t = batch.images + _column(pairs.t) * z
        x_r = self._step_down(nets, batch, pairs, x_t, z)
        with same_dropout(x_t.device) as rewind:
            online = nets.online(x_t, pairs.t, batch.labels)
            rewind()
            target = self._target(nets, batch, pairs, x_r)
        loss = self._weight(pairs) * self._distance(online, target)
        return LossTerms(loss, pairs.t, self._metrics(pairs, progress))

    def target_decay(self, progress: Progress) -> float | None:
        """mu(k), App. C of CM when adaptive; a constant otherwise; None without a target net."""
        match self.target:
            case TargetEMA(mu=mu, adaptive_s0=0):
                return mu
            case TargetEMA(mu=mu0, adaptive_s0=s0, variant=variant):
                assert isinstance(self.pairs, UniformPairs | LognormalPairs)
                N = num_levels(self.pairs.levels, progress)
                return mu_adaptive(N, s0, mu0, variant)
            case _:
                return None

    @torch.no_grad()
    def _step_down(self, nets: Nets, batch: Batch, pairs: Pairs, x_t: Tensor, z: Tensor) -> Tensor:
        """x_r: the same noise (CT), or one step of the teacher's probability-flow ODE (CD)."""
        if self.path == "noise":
            return batch.images + _column(pairs.r) * z
        teacher = nets.teacher
        assert teacher is not None, "the path needs a teacher"
        solver = heun_step if self.path == "heun" else euler_step
        return solver(lambda x, s: teacher(x, s, batch.labels), x_t, pairs.t, pairs.r)

    @torch.no_grad()
    def _target(self, nets: Nets, batch: Batch, pairs: Pairs, x_r: Tensor) -> Tensor:
        """f_theta-(x_r, r); at r <= sigma_min the boundary condition f(x, sigma) = x, exactly."""
        function = nets.detached if nets.target is None else nets.target
        inside = pairs.r > self.noise.sigma_min
        r = torch.where(inside, pairs.r, self.noise.sigma_min)
        return torch.where(_column(inside), function(x_r, r, batch.labels), x_r)

    def _distance(self, online: Tensor, target: Tensor) -> Tensor:
        if self.distance == "l1":
            return distances.l1(online, target)
        if self.distance == "squared_l2":
            return distances.squared_l2(online, target)
        c = distances.huber_c(online.shape[1:]) if self.huber_c is None else self.huber_c
        return distances.pseudo_huber(online, target, c)

    def _weight(self, pairs: Pairs) -> Tensor:
        if self.weight == "inverse_gap":
            return inverse_gap_weight(pairs.t, pairs.r)
        return torch.ones_like(pairs.t)

    def _metrics(self, pairs: Pairs, progress: Progress) -> dict[str, float]:
        metrics = {} if pairs.N is None else {"N": float(pairs.N)}
        mu = self.target_decay(progress)
        return metrics if mu is None else {**metrics, "mu": mu}


def _column(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


class _Rewind:
    """Puts the default generator of `device` back to where it was at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = self._get()

    def _get(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def __call__(self) -> None:
        self.after = self._get()
        self._set(self.before)

    def finish(self) -> None:
        self._set(self.after)


@contextmanager
def same_dropout(device: torch.device) -> Iterator[_Rewind]:
    """Both passes of a pair see one dropout mask: `rewind()` between them (iCT, section 3.4).

    Dropout draws from the default generator *of the tensor's device*; afterwards that generator
    stands where the first pass left it.
    """
    rewind = _Rewind(device)
    yield rewind
    rewind.finish()
