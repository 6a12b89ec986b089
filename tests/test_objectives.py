"""Objectives against closed forms: Gaussian data, where the exact denoiser and map are known."""

import math

import pytest
import torch
from torch import nn

from consistency.config import (
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    NoiseConfig,
    RatioPairs,
    SqrtLevels,
    StopGradTarget,
    TargetEMA,
    UniformPairs,
)
from consistency.data import Batch
from consistency.objectives import ConsistencyObjective, DenoisingObjective, Nets, Progress
from consistency.objectives.pairs import draw_pairs
from consistency.parameterization import ConsistencyFunction
from consistency.randomness import BatchRandom, rank_rows
from consistency.schedules import karras_sigmas

NOISE = NoiseConfig()
V = 0.25  # variance of the Gaussian data
START = Progress(0, 1000)


def exact_denoiser(x, sigma, labels=None):
    return V * x / (V + sigma.view(-1, 1, 1, 1) ** 2)


def exact_consistency(x, sigma, labels=None):
    eps = NOISE.sigma_min
    return x * torch.sqrt((V + eps**2) / (V + sigma.view(-1, 1, 1, 1) ** 2))


def gaussian_batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(count, 1, 2, 2, generator=generator) * math.sqrt(V), None)


def random(total, seed=0, start=0, stop=None):
    generator = torch.Generator().manual_seed(seed)
    return BatchRandom(generator, total, start, total if stop is None else stop)


def objective(**changes):
    parts = {
        "noise": NOISE,
        "pairs": UniformPairs(levels=ConstantLevels(N=18)),
        "path": "heun",
        "distance": "squared_l2",
        "huber_c": None,
        "weight": "uniform",
        "target": StopGradTarget(),
    }
    return ConsistencyObjective(**{**parts, **changes})


class Scale(nn.Module):
    """F(x) = a x with dropout: the smallest network that has a gradient and a mask."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, c_noise, labels):
        return self.dropout(self.a * x)


def exact_nets():
    return Nets(exact_consistency, exact_consistency, None, exact_denoiser)


def test_the_exact_denoiser_has_the_irreducible_denoising_loss():
    loss = DenoisingObjective(0.5, -1.2, 1.2)(
        Nets(exact_denoiser, exact_denoiser), gaussian_batch(20_000), START, random(20_000)
    )
    # E||D* - x||^2 = V s^2 / (V + s^2) per pixel, and with V = sigma_data^2 the weight undoes it.
    assert loss.per_sample.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("path", "order"), [("heun", 2), ("euler", 1)])
def test_distillation_at_the_exact_map_leaves_only_the_solver_error(path, order):
    def residual(N):
        terms = objective(path=path, pairs=UniformPairs(levels=ConstantLevels(N=N)))(
            exact_nets(), gaussian_batch(4000), START, random(4000)
        )
        return math.sqrt(terms.per_sample.mean().item())

    coarse, fine = residual(40), residual(160)
    # Local error of one step is O(h^(order + 1)) and h shrinks fourfold.
    assert fine < coarse / 4 ** (order + 0.5)


def test_heun_leaves_less_than_euler():
    losses = {
        path: objective(path=path)(exact_nets(), gaussian_batch(2000), START, random(2000))
        .per_sample.mean()
        .item()
        for path in ("heun", "euler")
    }
    assert losses["heun"] < losses["euler"] / 5


def test_the_same_noise_pair_is_an_euler_step_with_the_clean_image_as_denoiser():
    batch = gaussian_batch(64)
    seen = {}

    def record(x, sigma, labels=None):
        seen.setdefault("x", []).append(x)
        return x

    def clean(x, sigma, labels=None):
        return batch.images

    for path in ("noise", "euler"):
        objective(path=path)(Nets(record, record, None, clean), batch, START, random(64))
    x_t, x_r, x_t_euler, x_r_euler = seen["x"]
    assert torch.equal(x_t, x_t_euler)
    assert torch.allclose(x_r, x_r_euler, atol=2e-5)


def test_the_mean_isolation_target_is_the_euler_distillation_target():
    # In this linear case E[x0 + t_n z | x_t] is exactly the teacher's Euler step.
    pairs = UniformPairs(levels=ConstantLevels(N=3))
    x_r = {}

    def catch(name):
        def f(x, sigma, labels=None):
            x_r[name] = x
            return x

        return f

    batch = gaussian_batch(200_000)
    for path in ("noise", "euler"):
        nets = Nets(lambda x, s, labels: x, catch(path), None, exact_denoiser)
        objective(path=path, pairs=pairs)(nets, batch, START, random(200_000))
    difference = (x_r["noise"] - x_r["euler"]).mean().item()
    assert abs(difference) < 0.01


def test_the_target_carries_no_gradient_and_its_later_change_moves_nothing():
    online, target = Scale(), Scale()
    f = ConsistencyFunction(online, 0.5, 0.002)
    g = ConsistencyFunction(target, 0.5, 0.002)
    terms = objective(path="noise", target=TargetEMA(mu=0.9))(
        Nets(f, f, g), gaussian_batch(8), START, random(8)
    )
    with torch.no_grad():
        target.a.fill_(1.3)
    terms.per_sample.mean().backward()
    gradient = online.a.grad.clone()
    assert target.a.grad is None

    with torch.no_grad():
        target.a.fill_(0.3)
    online.a.grad = None
    again = objective(path="noise", target=TargetEMA(mu=0.9))(
        Nets(f, f, g), gaussian_batch(8), START, random(8)
    )
    again.per_sample.mean().backward()
    assert torch.equal(gradient, online.a.grad)


def test_with_equal_weights_and_levels_the_loss_is_exactly_zero_under_dropout():
    # Fails when the two passes see different dropout masks.
    f = ConsistencyFunction(Scale(dropout=0.5), 0.5, 0.002).train()
    one_level = UniformPairs(levels=ConstantLevels(N=2))
    flat = NoiseConfig(sigma_min=0.999999, sigma_max=1.0)
    shape = objective(path="noise", pairs=one_level, noise=flat)
    batch = Batch(torch.zeros(64, 1, 2, 2), None)
    torch.manual_seed(0)
    f_at_one = ConsistencyFunction(f.net, 0.5, 0.002).train()

    def online(x, sigma, labels):
        return f_at_one(x, torch.full_like(sigma, 2.0), labels)

    class Above(ConsistencyObjective):
        def _step_down(self, nets, batch, pairs, x_t, z):
            return x_t

        def _target(self, nets, batch, pairs, x_r):
            with torch.no_grad():
                return nets.detached(x_r, pairs.r, batch.labels)

    exact = Above(**{k: getattr(shape, k) for k in shape.__dataclass_fields__})
    terms = exact(Nets(online, online), batch, START, random(64))
    assert torch.count_nonzero(terms.per_sample) == 0


def test_dropout_leaves_the_generator_where_the_online_pass_left_it():
    f = ConsistencyFunction(Scale(dropout=0.5), 0.5, 0.002).train()
    torch.manual_seed(3)
    objective(path="noise")(Nets(f, f), gaussian_batch(8), START, random(8))
    after = torch.rand(1)
    torch.manual_seed(3)
    f(torch.zeros(8, 1, 2, 2), torch.ones(8), None)
    assert torch.equal(after, torch.rand(1))


def test_changing_the_distance_changes_the_gradient():
    gradients = []
    for distance in ("l1", "squared_l2", "pseudo_huber"):
        net = Scale()
        f = ConsistencyFunction(net, 0.5, 0.002)
        terms = objective(path="noise", distance=distance)(
            Nets(f, f), gaussian_batch(16), START, random(16)
        )
        terms.per_sample.mean().backward()
        gradients.append(net.a.grad.item())
    assert len({round(g, 9) for g in gradients}) == 3


def test_at_ratio_zero_the_target_is_the_image_itself():
    # Stage 0 with q = 2: r = 0 for small t, so the loss is a denoising loss there.
    seen = []

    def f(x, sigma, labels=None):
        seen.append(sigma)
        return torch.full_like(x, 7.0)

    batch = gaussian_batch(256)
    terms = objective(path="noise", pairs=RatioPairs(P_mean=-3.0, P_std=0.1), weight="inverse_gap")(
        Nets(f, f), batch, START, random(256)
    )
    expected = ((7.0 - batch.images) ** 2).flatten(1).mean(1) / terms.sigma
    assert torch.allclose(terms.per_sample, expected, rtol=1e-5)
    assert torch.isfinite(seen[1]).all()


def test_two_ranks_draw_together_what_one_draws_alone():
    pairs = LognormalPairs(levels=DoublingLevels(s0=10, s1=40))
    whole = draw_pairs(pairs, NOISE, START, random(10))
    parts = [
        draw_pairs(pairs, NOISE, START, random(10, start=start, stop=stop))
        for start, stop in (rank_rows(10, 0, 3), rank_rows(10, 1, 3), rank_rows(10, 2, 3))
    ]
    assert torch.equal(whole.t, torch.cat([part.t for part in parts]))
    assert torch.equal(whole.r, torch.cat([part.r for part in parts]))


def test_pairs_are_neighbours_on_the_grid():
    grid = karras_sigmas(18, NOISE.sigma_min, NOISE.sigma_max).float()
    drawn = draw_pairs(UniformPairs(levels=ConstantLevels(N=18)), NOISE, START, random(4000))
    index = torch.searchsorted(grid, drawn.r)
    assert torch.equal(grid[index], drawn.r)
    assert torch.equal(grid[index + 1], drawn.t)
    assert set(index.tolist()) == set(range(17))  # every interval, none beyond


def test_lognormal_pairs_follow_the_published_law():
    # iCT, N = 11 (methods Appendix B4).
    law = [0.0626, 0.1817, 0.2455, 0.2135, 0.1424, 0.0806, 0.0411, 0.0196, 0.0089, 0.0040]
    pairs = LognormalPairs(levels=ConstantLevels(N=11))
    drawn = draw_pairs(pairs, NOISE, START, random(200_000))
    grid = karras_sigmas(11, NOISE.sigma_min, NOISE.sigma_max).float()
    share = torch.bincount(torch.searchsorted(grid, drawn.r), minlength=10) / 200_000
    assert torch.allclose(share, torch.tensor(law), atol=0.004)


def test_schedules_follow_images_seen_and_stop_at_the_budget():
    pairs = UniformPairs(levels=SqrtLevels(s0=2, s1=150))
    adaptive = objective(pairs=pairs, target=TargetEMA(mu=0.9, adaptive_s0=2))
    expected = {0: (2, 0.9), 250: (76, 0.9972), 1000: (151, 0.9986), 1200: (151, 0.9986)}
    for images, (N, mu) in expected.items():
        progress = Progress(images, 1000)
        assert draw_pairs(pairs, NOISE, progress, random(4)).N == N
        assert adaptive.target_decay(progress) == pytest.approx(mu, abs=5e-5)
    assert objective().target_decay(START) is None
