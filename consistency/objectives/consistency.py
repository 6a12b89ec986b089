"""The discrete consistency loss as one composition of parts (CD, CT, iCT, ECT).

    lambda(t, r) d( f_theta(x_t, t), stopgrad f_theta-(x_r, r) )

Song et al. 2023, Algorithms 2 and 3; Song & Dhariwal 2023 (iCT); Geng et al. 2024 (ECT).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.method_config import (
    ConsistencyConfig,
    LognormalPairs,
    PairsConfig,
    TargetConfig,
    TargetEMA,
    UniformPairs,
)
from consistency.objectives.base import Function, LossTerms, Nets, Progress, column
from consistency.objectives.distance import Distance
from consistency.objectives.dropout import same_dropout
from consistency.objectives.pairs import Pairs, draw_pairs, num_levels
from consistency.objectives.weighting import pair_weight
from consistency.parameterization import ConsistencyFunction, Denoiser, guided
from consistency.randomness import BatchRandom
from consistency.schedules import mu_adaptive
from consistency.solvers import euler_step, heun_step


@dataclass(frozen=True)
class ConsistencyObjective:
    """pairs x path x distance x weight x target rule."""

    noise: NoiseConfig
    pairs: PairsConfig
    path: Literal["heun", "euler", "noise"]
    distance: Distance
    weight: Literal["uniform", "inverse_gap", "edm"]
    target: TargetConfig
    boundary: float  # f is the identity there
    guidance: float = 1.0

    @classmethod
    def of(
        cls, config: ConsistencyConfig, noise: NoiseConfig, lpips: nn.Module | None = None
    ) -> "ConsistencyObjective":
        """`lpips` is the loaded network where config.distance asks for it."""
        return cls(
            noise,
            config.pairs,
            config.path,
            Distance(config.distance, config.huber_c, lpips),
            config.weight,
            config.target,
            noise.sigma_min if config.boundary is None else config.boundary,
            config.guidance,
        )

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        pairs = draw_pairs(self.pairs, self.noise, progress, random)
        z = random.normal(*batch.images.shape[1:])
        x_t = batch.images + column(pairs.t) * z
        x_r = self._step_down(nets, batch, pairs, x_t, z)
        with same_dropout(x_t.device) as rewind:
            online = nets.online(x_t, pairs.t, batch.labels)
            rewind()
            function = nets.detached if nets.target is None else nets.target
            target = consistency_target(function, x_r, pairs.r, batch.labels, self.boundary)
        weight = pair_weight(self.weight, pairs.t, pairs.r, self.noise.sigma_data)
        loss = weight * self.distance(online, target)
        return LossTerms(loss, pairs.t, self._metrics(pairs, progress))

    def function(self, net: nn.Module) -> nn.Module:
        return ConsistencyFunction(net, self.noise.sigma_data, self.boundary, self.noise.c_noise)

    def teacher_function(self, net: nn.Module) -> Function:
        return guided(Denoiser(net, self.noise.sigma_data, self.noise.c_noise), self.guidance)

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

    def loss_weight(self) -> nn.Module | None:
        return None

    @torch.no_grad()
    def _step_down(self, nets: Nets, batch: Batch, pairs: Pairs, x_t: Tensor, z: Tensor) -> Tensor:
        """x_r: the same noise (CT), or one step of the teacher's probability-flow ODE (CD)."""
        if self.path == "noise":
            return batch.images + column(pairs.r) * z
        teacher = nets.teacher
        assert teacher is not None, "the path needs a teacher"
        solver = heun_step if self.path == "heun" else euler_step
        return solver(lambda x, s: teacher(x, s, batch.labels), x_t, pairs.t, pairs.r)

    def _metrics(self, pairs: Pairs, progress: Progress) -> dict[str, float]:
        metrics = {} if pairs.N is None else {"N": float(pairs.N)}
        mu = self.target_decay(progress)
        return metrics if mu is None else {**metrics, "mu": mu}


@torch.no_grad()
def consistency_target(
    function: Function, x_r: Tensor, r: Tensor, labels: Tensor | None, boundary: float
) -> Tensor:
    """f_theta-(x_r, r); at r <= boundary the boundary condition f(x, sigma) = x, exactly."""
    inside = r > boundary
    # Rows at the boundary need some level that the network can stand; their output is not used.
    level = torch.where(inside, r, max(boundary, 1e-3))
    return torch.where(column(inside), function(x_r, level, labels), x_r)
