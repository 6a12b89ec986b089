"""EDM's denoising loss (Karras et al. 2022, Eq. 8 with Table 1)."""

from dataclasses import dataclass

import torch
from torch import nn

from consistency.config import NoiseConfig, TeacherConfig
from consistency.data import Batch
from consistency.distances import squared_l2
from consistency.objectives.base import Function, LossTerms, Nets, Progress, column
from consistency.objectives.labels import drop_labels
from consistency.objectives.weighting import LossWeight, balanced
from consistency.parameterization import Denoiser
from consistency.randomness import BatchRandom
from consistency.schedules import edm_weight


@dataclass(frozen=True)
class DenoisingObjective:
    """lambda(sigma) ||D(x0 + sigma z; sigma) - x0||^2, ln sigma ~ N(P_mean, P_std^2).

    The square is averaged over pixels, so the loss does not grow with resolution. As lambda =
    1 / c_out^2, it is also TrigFlow's || F - v / sigma_data ||^2 (Eq. 3, Lu and Song 2024).
    """

    noise: NoiseConfig
    P_mean: float
    P_std: float
    label_dropout: float = 0.0
    adaptive_weight: bool = False

    @classmethod
    def of(cls, config: TeacherConfig, noise: NoiseConfig) -> "DenoisingObjective":
        return cls(noise, config.P_mean, config.P_std, config.label_dropout, config.adaptive_weight)

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        x0 = batch.images
        sigma = torch.exp(self.P_mean + self.P_std * random.normal())
        x = x0 + column(sigma) * random.normal(*x0.shape[1:])
        labels = drop_labels(batch.labels, self.label_dropout, random)
        weight = edm_weight(sigma, self.noise.sigma_data)
        if nets.weighted is None:
            return LossTerms(weight * squared_l2(nets.online(x, sigma, labels), x0), sigma)
        denoised, u = nets.weighted(sigma, x, sigma, labels)
        return LossTerms(balanced(weight * squared_l2(denoised, x0), u), sigma)

    def function(self, net: nn.Module) -> nn.Module:
        return Denoiser(net, self.noise.sigma_data, self.noise.c_noise)

    def teacher_function(self, net: nn.Module) -> Function:
        raise NotImplementedError("denoising has no teacher")

    def target_decay(self, progress: Progress) -> float | None:
        return None

    def loss_weight(self) -> nn.Module | None:
        if not self.adaptive_weight:
            return None
        return LossWeight(self.noise.sigma_data, self.noise.c_noise)
