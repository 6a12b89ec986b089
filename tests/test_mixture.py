"""Every objective, on a 2-d mixture of Gaussians whose one-step map is known.

The exact denoiser of a mixture is closed form, so the probability-flow ODE can be integrated as
finely as wanted: its end is what a consistency model must give for its start. A small MLP is
trained by each objective through the real loop. Bounds are about twice the worst of 3 seeds.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn

from consistency.config import ConstantEMA, NoiseConfig, TeacherConfig
from consistency.data import Batch
from consistency.loop import train
from consistency.method_config import (
    ConsistencyConfig,
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    MeanFlowConfig,
    RatioPairs,
    SCMConfig,
    SqrtLevels,
    TargetEMA,
    TruncateConfig,
    UniformPairs,
)
from consistency.objectives import Progress, objective_for
from consistency.parameterization import ConsistencyFunction, Denoiser, MeanVelocity
from consistency.randomness import derive_seed
from consistency.schedules import karras_sigmas
from consistency.solvers import heun_step
from consistency.state import TrainState

NOISE = NoiseConfig()
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
STD = 0.15


def _means():
    """Four modes of mean zero altogether, scaled so that a coordinate has std 0.5."""
    means = torch.tensor([[0.5, 0.5], [-0.6, 0.1], [0.2, -0.7], [-0.3, -0.5]], dtype=torch.float64)
    means = means - WEIGHTS @ means
    spread = (WEIGHTS @ means.square()).mean()
    return means * ((NOISE.sigma_data**2 - STD**2) / spread).sqrt()


MEANS = _means()


def posterior(x, sigma):
    """Of x0 given x0 + sigma z = x: each mode's mean [b, 4, 2] and log weight [b, 4], float64."""
    x, variance = x.double().flatten(1), sigma.double()[:, None] ** 2
    away = x[:, None] - MEANS
    logits = WEIGHTS.log() - away.square().sum(2) / (2 * (STD**2 + variance))
    means = (STD**2 * x[:, None] + variance[:, None] * MEANS) / (STD**2 + variance[:, None])
    return means, logits


def exact_denoiser(x, sigma, labels=None):
    """E[x0 | x0 + sigma z = x], float64 [b, 2, 1, 1]."""
    means, logits = posterior(x, sigma)
    return (logits.softmax(1)[..., None] * means).sum(1)[..., None, None]


class ExactNetwork(nn.Module):
    """The inner network F whose denoiser is exact: what an ideally trained teacher would be."""

    def forward(self, u, c_noise, labels=None, gap=None):
        sigma = (4 * c_noise.double()).exp()
        column, sd = sigma.view(-1, 1, 1, 1), NOISE.sigma_data
        norm = (column**2 + sd**2).sqrt()
        x = u.double() * norm
        D = exact_denoiser(x, sigma)
        return ((D - sd**2 / norm**2 * x) * norm / (column * sd)).float()


class MLP(nn.Module):
    """21 k parameters; smooth features of c_noise and gap, as continuous time wants them."""

    def __init__(self, width=96):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 2 * 9, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x, c_noise, labels=None, gap=None):
        gap = torch.zeros_like(c_noise) if gap is None else gap
        features = [x.flatten(1)]
        for level in (c_noise, gap):
            angles = level[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
            features += [level[:, None], angles.cos(), angles.sin()]
        return self.layers(torch.cat(features, 1))[..., None, None]


class Points:
    """The stream of the loop: points of the mixture as a pure function of the position."""

    def batch(self, position, total, start, stop, device):
        generator = torch.Generator().manual_seed(derive_seed("points", position))
        return Batch(draw(total, generator)[start:stop].float(), None)


def draw(count, generator):
    mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return (MEANS[mode] + STD * noise)[..., None, None]


@cache
def truth(count=2000):
    """(z, f(80 z, 80)): starts, and where the exact ODE takes them, in 200 Heun steps.

    As the mixture has mean 0, 80 z is also where MeanFlow's path is that begins at e = z.
    """
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 2, 1, 1, generator=generator)
    return z, integrated(exact_denoiser, z, 200)


def integrated(denoise, z, N):
    levels = [*karras_sigmas(N, NOISE.sigma_min, NOISE.sigma_max).flip(0)]
    x = NOISE.sigma_max * z.double()
    for sigma, below in pairwise(levels):
        x = heun_step(denoise, x, sigma, below)
    return x


def common(steps, lr=2e-3):
    return {
        "images": 256 * steps,
        "batch": 256,
        "lr": lr,
        "decay_from": 0.5,
        "ema": (ConstantEMA(beta=0.99),),
    }


def trained(config, seed, teacher=None, start=None):
    """The MLP after training by `config`, with the weights of its sampling EMA."""
    torch.manual_seed(seed)
    net = MLP()
    if start is not None:
        net.load_state_dict(start.state_dict())
    objective = objective_for(config, NOISE)
    has_target = objective.target_decay(Progress(0, config.images)) is not None
    state = TrainState.fresh(net, MLP() if has_target else None, config, objective.loss_weight())
    for _ in train(state, objective, Points(), config, teacher=teacher, seed=seed):
        pass
    net.load_state_dict(state.averages[config.ema[0].name])
    return net.eval().requires_grad_(False)


def rms(difference):
    """Of one coordinate; the mixture's own is 0.5, so a model that knows nothing is off by 0.5."""
    return difference.double().square().mean().sqrt().item()


def error(net, boundary=NOISE.sigma_min):
    """RMS distance of the one-step map from sigma_max to the true one."""
    z, exact = truth()
    f = ConsistencyFunction(net, NOISE.sigma_data, boundary)
    x = NOISE.sigma_max * z
    return rms(f(x, torch.full((len(z),), NOISE.sigma_max)) - exact)


@cache
def denoiser(seed=0):
    return trained(TeacherConfig(**common(1200)), seed)


@cache
def easy(seed=0):
    """The student of ECT, from the denoiser's weights."""
    config = ConsistencyConfig(
        method="ect",
        init="teacher",
        pairs=RatioPairs(stages=6),
        path="noise",
        huber_c=1e-8,
        weight="inverse_gap",
        boundary=0.0,
        **common(1200),
    )
    return trained(config, seed, start=denoiser(seed))


def test_an_untrained_network_is_far_off():
    torch.manual_seed(0)
    assert error(MLP().requires_grad_(False)) > 0.45


def test_the_exact_network_is_the_exact_denoiser():
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0])
    x = draw(4, torch.Generator().manual_seed(0)).float() * (1 + sigma.view(-1, 1, 1, 1))
    got = Denoiser(ExactNetwork(), NOISE.sigma_data)(x, sigma)
    torch.testing.assert_close(got, exact_denoiser(x, sigma).float(), rtol=1e-4, atol=1e-5)


def test_denoising_reaches_the_map_through_the_ode():
    z, exact = truth()
    assert rms(integrated(Denoiser(denoiser(), NOISE.sigma_data), z, 40) - exact) < 0.07


def distilled(seed=0):
    config = ConsistencyConfig(
        method="cd",
        init="teacher",
        pairs=UniformPairs(levels=ConstantLevels(N=18)),
        path="heun",
        distance="squared_l2",
        **common(1200),
    )
    return trained(config, seed, ExactNetwork(), denoiser(seed))


def test_distillation_reaches_the_map():
    assert error(distilled()) < 0.25


def isolated(seed=0):
    config = ConsistencyConfig(
        method="ct-2023",
        init="scratch",
        pairs=UniformPairs(levels=SqrtLevels(s0=2, s1=20)),
        path="noise",
        distance="squared_l2",
        target=TargetEMA(mu=0.3, adaptive_s0=2),
        **common(1200),
    )
    return trained(config, seed)


@cache
def isolation_limit(N, chains=60):
    """What isolation can reach on a grid of N points: f(x_t) = E[f(x_r) | x_t] down the grid.

    Its minimiser is no point of the ODE but the mean end of a random chain x_t -> x0 -> x_r, each
    x0 drawn from the posterior.
    """
    generator = torch.Generator().manual_seed(2)
    z, _ = truth()
    x = (NOISE.sigma_max * z[:500].double()).repeat(chains, 1, 1, 1)
    for sigma, below in pairwise(karras_sigmas(N, NOISE.sigma_min, NOISE.sigma_max).flip(0)):
        means, logits = posterior(x, sigma.expand(len(x)))
        mode = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        std = STD * sigma / (STD**2 + sigma**2).sqrt()
        x0 = means[torch.arange(len(x)), mode]
        x0 = x0 + std * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        x0 = x0[..., None, None]
        x = x0 + below / sigma * (x - x0)
    return x.view(chains, -1, 2, 1, 1).mean(0)


def test_isolation_reaches_its_own_limit():
    net = isolated()
    z, exact = truth()
    f = ConsistencyFunction(net, NOISE.sigma_data, NOISE.sigma_min)
    ends = f(NOISE.sigma_max * z[:500], torch.full((500,), NOISE.sigma_max))
    limit = isolation_limit(21)
    assert rms(limit - exact[:500]) == pytest.approx(0.14, abs=0.02)  # of the method, not of us
    assert rms(ends - limit) < 0.17
    assert error(net) < 0.3


def improved(seed=0):
    config = ConsistencyConfig(
        method="ict",
        init="scratch",
        pairs=LognormalPairs(levels=DoublingLevels(s0=10, s1=160)),
        path="noise",
        weight="inverse_gap",
        **common(1200),
    )
    return trained(config, seed)


def test_improved_isolation_reaches_the_map():
    assert error(improved()) < 0.2


def test_easy_tuning_reaches_the_map():
    assert error(easy(), 0.0) < 0.2


def truncated(seed=0):
    first = easy(seed)
    config = TruncateConfig(method="tcm", stage=6, boundary=0.0, **common(500, lr=5e-4))
    return trained(config, seed, first, first)


def test_the_truncated_stage_stays_at_the_map():
    assert error(truncated(), 0.0) < 0.22


def continuous(seed=0, steps=1000, **parts):
    config = SCMConfig(
        method="scm",
        init="teacher",
        P_std=1.8,
        **{"adaptive_weight": False, "prior_weight": "uniform", **common(steps), **parts},
    )
    teacher = ExactNetwork() if parts["path"] == "teacher" else None
    return trained(config, seed, teacher, denoiser(seed))


@pytest.mark.parametrize("path", ["teacher", "noise"])
def test_continuous_time_reaches_the_map(path):
    assert error(continuous(path=path), 0.0) < {"teacher": 0.14, "noise": 0.22}[path]


def mean_flow(seed=0):
    return trained(MeanFlowConfig(method="mean_flow", power=0.0, **common(1200)), seed)


def mean_flow_error(net):
    z, exact = truth()
    times = torch.ones(len(z))
    return rms(z - MeanVelocity(net)(z, times, times) - exact)


def test_mean_flow_reaches_the_map():
    # p = 0: with 2 numbers a sample, a power of the noisy square is no longer least squares.
    assert mean_flow_error(mean_flow()) < 0.16
