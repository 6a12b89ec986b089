"""EDM's denoising loss (Karras et al. 2022, Eq. 8 with Table 1)."""

from dataclasses import dataclass

import torch

from consistency.data import Batch
from consistency.distances import squared_l2
from consistency.objectives.base import LossTerms, Nets, Progress
from consistency.randomness import BatchRandom
from consistency.schedules import edm_weight


@dataclass(frozen=True)
class DenoisingObjective:
    """lambda(sigma) ||D(x0 + sigma z; sigma) - x0||^2, ln sigma ~ N(P_mean, P_std^2).

    The square is averaged over pixels, so the loss does not grow with resolution.
    """

    sigma_data: float
    P_mean: float
    P_std: float

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        x0 = batch.images
        sigma = torch.exp(self.P_mean + self.P_std * random.normal())
        x = x0 + sigma.view(-1, 1, 1, 1) * random.normal(*x0.shape[1:])
        error = squared_l2(nets.online(x, sigma, batch.labels), x0)
        return LossTerms(edm_weight(sigma, self.sigma_data) * error, sigma)

    def target_decay(self, progress: Progress) -> float | None:
        return None
