"""MeanFlow (Geng et al. 2025, arXiv 2505.13447): the average velocity between two times.

Symbols: z_t = (1 - t) x0 + t e with e ~ N(0, 1), v = e - x0, t in [0, 1];
(t - r) u(z_t, t, r) = integral of v from r to t, hence u = v - (t - r) du/dt (its Eq. 6).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consistency.data import Batch
from consistency.method_config import MeanFlowConfig, SeparateTimes, SharedTimes
from consistency.objectives.base import Function, LossTerms, Nets, Progress, column
from consistency.objectives.dropout import same_dropout
from consistency.objectives.jvp import directional_derivative
from consistency.objectives.labels import drop_labels
from consistency.parameterization import MeanVelocity
from consistency.randomness import BatchRandom


@dataclass(frozen=True)
class MeanFlowObjective:
    """||u - sg(v - (t - r) du/dt)||^2 / sg(that + c)^p, squares summed over the sample."""

    times: SharedTimes | SeparateTimes
    apart: float
    power: float
    power_c: float
    guidance: float = 1.0
    kappa: float = 0.0
    label_dropout: float = 0.0

    @classmethod
    def of(cls, config: MeanFlowConfig) -> "MeanFlowObjective":
        return cls(
            config.times,
            config.apart,
            config.power,
            config.power_c,
            config.guidance,
            config.kappa,
            config.label_dropout,
        )

    def __call__(
        self, nets: Nets, batch: Batch, progress: Progress, random: BatchRandom
    ) -> LossTerms:
        x0 = batch.images
        t, r = draw_times(self.times, self.apart, random)
        e = random.normal(*x0.shape[1:])
        z = (1 - column(t)) * x0 + column(t) * e
        labels = drop_labels(batch.labels, self.label_dropout, random)
        gap = t - r
        with same_dropout(x0.device) as rewind:
            u = nets.online(z, t, gap, labels)
            rewind()
            v = self._velocity(nets, z, t, e - x0, labels)
            rewind()
            _, du = directional_derivative(
                lambda z, t, gap: nets.detached(z, t, gap, labels),
                (z, t, gap),
                (v, torch.ones_like(t), torch.ones_like(t)),
            )
        target = mean_flow_target(v, du, gap)
        loss = power_loss((u.float() - target).square().flatten(1).sum(1), self.power, self.power_c)
        return LossTerms(loss, t / (1 - t))

    def function(self, net: nn.Module) -> nn.Module:
        return MeanVelocity(net)

    def teacher_function(self, net: nn.Module) -> Function:
        raise NotImplementedError("MeanFlow has no teacher")

    def target_decay(self, progress: Progress) -> float | None:
        return None

    def loss_weight(self) -> nn.Module | None:
        return None

    @torch.no_grad()
    def _velocity(
        self, nets: Nets, z: Tensor, t: Tensor, v: Tensor, labels: Tensor | None
    ) -> Tensor:
        """v, or w v + (1 - w - kappa) u(z, t, t | null) + kappa u(z, t, t | class) (its Eq. 20)."""
        if labels is None or (self.guidance == 1 and self.kappa == 0):
            return v
        null, zero = torch.full_like(labels, -1), torch.zeros_like(t)
        unconditional = nets.detached(z, t, zero, null)
        conditional = nets.detached(z, t, zero, labels)
        mixed = self.guidance * v + (1 - self.guidance - self.kappa) * unconditional
        return torch.where(column(labels >= 0), mixed + self.kappa * conditional, v)


def mean_flow_target(v: Tensor, du: Tensor, gap: Tensor) -> Tensor:
    """v - (t - r) du/dt, like v; gap = t - r [b]."""
    return v - column(gap) * du


def power_loss(squares: Tensor, p: float, c: float) -> Tensor:
    """squares / stopgrad(squares + c)^p [b]: p = 0 is the square, p = 0.5 like pseudo-Huber."""
    return squares / (squares.detach() + c) ** p


def draw_times(
    times: SharedTimes | SeparateTimes, apart: float, random: BatchRandom
) -> tuple[Tensor, Tensor]:
    """t >= r, float32 [b]; all but the first `apart` of the global batch have r = t."""
    match times:
        case SharedTimes(P_mean=P_mean, P_std=P_std):
            a = torch.sigmoid(P_mean + P_std * random.normal())
            b = torch.sigmoid(P_mean + P_std * random.normal())
        case SeparateTimes(t_mean=t_mean, t_std=t_std, r_mean=r_mean, r_std=r_std):
            a = torch.sigmoid(t_mean + t_std * random.normal())
            b = torch.sigmoid(r_mean + r_std * random.normal())
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.where(random.row() < round(apart * random.total), r, t)
