"""The continuous-time consistency loss in TrigFlow: sCD and sCT (Lu and Song 2024, Algorithm 1).

Symbols: tan t = sigma / sigma_data, x_t = cos(t) x0 + sin(t) z with z ~ N(0, sigma_data^2),
f = cos(t) x_t - sin(t) sigma_data F(x_t / sigma_data, t). The network is never differentiated by t
alone: the chain rule's factor cos(t) sin(t) goes into the tangents, where it cancels what would
grow without bound near t = pi/2 (section 4.1, "JVP rearrangement").
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.method_config import SCMConfig
from consistency.objectives.base import Function, LossTerms, Nets, Progress, column
from consistency.objectives.dropout import same_dropout
from consistency.objectives.jvp import directional_derivative
from consistency.objectives.weighting import LossWeight, balanced
from consistency.parameterization import NoiseLabel, TrigFlowVelocity, guided, noise_label
from consistency.randomness import BatchRandom
from consistency.schedules import sigma_to_angle


@dataclass(frozen=True)
class SCMObjective:
    """exp(w(t)) / dim ||F_theta - F_theta- - g||^2 - w(t), g the normalised tangent."""

    noise: NoiseConfig
    path: Literal["teacher", "noise"]
    P_mean: float
    P_std: float
    tangent: Literal["normalize", "clip"]
    tangent_c: float
    tangent_norm: Literal["l2", "rms"]
    tangent_warmup_images: int
    adaptive_weight: bool
    prior_weight: Literal["uniform", "inverse_sigma"]
    guidance: float = 1.0

    @classmethod
    def of(cls, config: SCMConfig, noise: NoiseConfig) -> "SCMObjective":
        return cls(
            noise,
            config.path,
            config.P_mean,
            config.P_std,
            config.tangent,
            config.tangent_c,
            config.tangent_norm,
            config.tangent_warmup_images,
            config.adaptive_weight,
            config.prior_weight,
            config.guidance,
        )

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        sigma_data = self.noise.sigma_data
        x0, labels = batch.images, batch.labels
        sigma = torch.exp(self.P_mean + self.P_std * random.normal())
        z = sigma_data * random.normal(*x0.shape[1:])
        t = sigma_to_angle(sigma, sigma_data)
        cos, sin = column(t.cos()), column(t.sin())
        x_t = cos * x0 + sin * z
        u, c_noise = x_t / sigma_data, noise_label(sigma, sigma_data, self.noise.c_noise)
        v = cos * z - sin * x0
        if self.path == "teacher":
            assert nets.teacher is not None, "sCD needs a teacher"
            with torch.no_grad():
                v = sigma_data * nets.teacher(u, c_noise, labels)

        with same_dropout(x0.device) as rewind:
            if nets.weighted is None:
                F, log_variance = nets.online(u, c_noise, labels), None
            else:
                F, log_variance = nets.weighted(sigma, u, c_noise, labels)
            rewind()
            F_minus, F_dot = directional_derivative(
                lambda u, c_noise: nets.detached(u, c_noise, labels),
                (u, c_noise),
                (cos * sin * v / sigma_data, label_rate(t, self.noise.c_noise)),
            )
        rho = 1.0
        if self.tangent_warmup_images:
            rho = min(1.0, progress.images / self.tangent_warmup_images)
        g = scm_tangent(F_minus, F_dot, x_t, v, t, sigma_data, rho)
        if self.tangent == "clip":
            g = g.clamp(-1, 1)
        else:
            g = normalize_tangent(g, self.tangent_c, self.tangent_norm)

        # F_theta- is F itself without its graph, so that lower precision in F leaves g alone.
        loss = (F.float() - F.detach().float() - g).square().flatten(1).mean(1)
        if self.prior_weight == "inverse_sigma":
            loss = loss / sigma
        if log_variance is not None:
            loss = balanced(loss, log_variance)
        return LossTerms(loss, sigma, {"tangent_warmup": rho} if rho < 1 else {})

    def function(self, net: nn.Module) -> nn.Module:
        return TrigFlowVelocity(net)

    def teacher_function(self, net: nn.Module) -> Function:
        return guided(TrigFlowVelocity(net), self.guidance)

    def target_decay(self, progress: Progress) -> float | None:
        return None

    def loss_weight(self) -> nn.Module | None:
        if not self.adaptive_weight:
            return None
        return LossWeight(self.noise.sigma_data, self.noise.c_noise)


def scm_tangent(
    F: Tensor, F_dot: Tensor, x_t: Tensor, v: Tensor, t: Tensor, sigma_data: float, rho: float
) -> Tensor:
    """g = cos(t) df/dt = -cos^2(t) (sd F - v) - rho (cos(t) sin(t) x_t + sd F_dot), like x_t.

    v = dx_t/dt; F_dot = cos(t) sin(t) dF/dt; rho in [0, 1] is the tangent warm-up. The factor
    cos(t) is the prior weight 1 / (sd tan t) times df/dF = -sin(t) sd (Sec. 4.2).
    """
    cos, sin = column(t.cos()), column(t.sin())
    return -(cos**2) * (sigma_data * F - v) - rho * (cos * sin * x_t + sigma_data * F_dot)


def normalize_tangent(g: Tensor, c: float = 0.1, norm: Literal["l2", "rms"] = "l2") -> Tensor:
    """g / (|g| + c) per sample; "rms" divides the norm by sqrt(dim), which makes c larger to it."""
    length = g.flatten(1).norm(dim=1)
    if norm == "rms":
        length = length / g[0].numel() ** 0.5
    return g / (column(length) + c)


def label_rate(t: Tensor, c_noise: NoiseLabel) -> Tensor:
    """cos(t) sin(t) d c_noise/dt: cos(t) sin(t) for the angle, 1/4 for ln(sigma) / 4."""
    if c_noise == "angle":
        return t.cos() * t.sin()
    return torch.full_like(t, 250.0 if c_noise == "log_sigma_1000" else 0.25)
