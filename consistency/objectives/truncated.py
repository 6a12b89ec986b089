"""Truncated consistency models, second stage (Lee et al. 2024, arXiv 2410.14895).

The student h learns sigma >= sigma_prime only; below, the frozen first stage g stands. A share of
the batch sits exactly at sigma_prime, where its target is g's answer: that ties the two together.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.method_config import TruncateConfig
from consistency.objectives.base import Function, LossTerms, Nets, Progress, column
from consistency.objectives.consistency import consistency_target
from consistency.objectives.distance import Distance
from consistency.objectives.dropout import same_dropout
from consistency.objectives.weighting import pair_weight
from consistency.parameterization import ConsistencyFunction
from consistency.randomness import BatchRandom
from consistency.schedules import ect_r, truncated_student_t_sigmas


@dataclass(frozen=True)
class TruncatedObjective:
    """mean over t > sigma_prime + boundary_weight * mean over t = sigma_prime."""

    noise: NoiseConfig
    sigma_prime: float
    nu: float
    loc: float
    scale: float
    q: float
    stage: int
    k: float
    b: float
    max_ratio: float | None
    distance: Distance
    weight: Literal["uniform", "inverse_gap", "edm"]
    boundary: float
    boundary_share: float
    boundary_weight: float

    @classmethod
    def of(cls, config: TruncateConfig, noise: NoiseConfig) -> "TruncatedObjective":
        return cls(
            noise,
            config.sigma_prime,
            config.nu,
            config.loc,
            config.scale,
            config.q,
            config.stage,
            config.k,
            config.b,
            config.max_ratio,
            Distance(config.distance, config.huber_c),
            config.weight,
            noise.sigma_min if config.boundary is None else config.boundary,
            config.boundary_share,
            config.boundary_weight,
        )

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        t = truncated_student_t_sigmas(
            random.uniform(), self.nu, self.loc, self.scale, self.sigma_prime, self.noise.sigma_max
        )
        tied = round(self.boundary_share * random.total)  # images of the global batch
        at_boundary = random.row() < tied
        t = torch.where(at_boundary, self.sigma_prime, t)
        r = ect_r(t, self.stage, self.q, self.k, self.b, self.max_ratio)
        z = random.normal(*batch.images.shape[1:])
        x_t, x_r = batch.images + column(t) * z, batch.images + column(r) * z
        assert nets.teacher is not None, "the second stage needs the first"
        with same_dropout(x_t.device) as rewind:
            online = nets.online(x_t, t, batch.labels)
            rewind()
            own = consistency_target(nets.detached, x_r, r, batch.labels, self.boundary)
        frozen = consistency_target(nets.teacher, x_r, r, batch.labels, self.boundary)
        target = torch.where(column(r >= self.sigma_prime), own, frozen)
        loss = pair_weight(self.weight, t, r, self.noise.sigma_data) * self.distance(online, target)
        # Two means over parts of the batch, written as one mean over all of it.
        share = torch.where(
            at_boundary,
            self.boundary_weight * random.total / tied,
            random.total / (random.total - tied),
        )
        return LossTerms(share * loss, t)

    def function(self, net: nn.Module) -> nn.Module:
        return ConsistencyFunction(net, self.noise.sigma_data, self.boundary, self.noise.c_noise)

    def teacher_function(self, net: nn.Module) -> Function:
        return self.function(net)

    def target_decay(self, progress: Progress) -> float | None:
        return None

    def loss_weight(self) -> nn.Module | None:
        return None
