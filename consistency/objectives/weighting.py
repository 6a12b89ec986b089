"""Weights of the loss over noise levels: fixed functions, and one learned along (EDM2, sCM)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from consistency.parameterization import NoiseLabel, noise_label
from consistency.schedules import edm_weight, inverse_gap_weight

FEATURES = 128


def pair_weight(
    kind: Literal["uniform", "inverse_gap", "edm"], t: Tensor, r: Tensor, sigma_data: float
) -> Tensor:
    """lambda(t, r) [b]: 1, 1 / (t - r) (iCT, ECT on CIFAR-10) or 1 / c_out^2(t) (ECT, IN64)."""
    if kind == "inverse_gap":
        return inverse_gap_weight(t, r)
    if kind == "edm":
        return edm_weight(t, sigma_data)
    return torch.ones_like(t)


class LossWeight(nn.Module):
    """u(sigma) [b] -> [b], the log-variance of the loss at a noise level: one linear layer on fixed
    Fourier features of c_noise (Sec. 2.2 and Appendix A.6, EDM2). Starts at u = 0.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, sigma_data: float, c_noise: NoiseLabel) -> None:
        super().__init__()
        self.sigma_data, self.c_noise = sigma_data, c_noise
        generator = torch.Generator().manual_seed(0)  # any fixed draw will do
        frequencies = 2 * math.pi * torch.randn(FEATURES, generator=generator)
        phases = 2 * math.pi * torch.rand(FEATURES, generator=generator)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", phases)
        self.weight = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, sigma: Tensor) -> Tensor:
        with torch.autocast(sigma.device.type, enabled=False):
            label = noise_label(sigma.float(), self.sigma_data, self.c_noise)
            features = torch.cos(label[:, None] * self.frequencies + self.phases)
            return features @ self.weight * math.sqrt(2 / FEATURES)


def balanced(loss: Tensor, u: Tensor) -> Tensor:
    """loss / exp(u) + u: at its minimum over u the weighted loss is 1 at every noise level."""
    return loss * torch.exp(-u) + u
