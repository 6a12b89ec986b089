"""Objectives against closed forms: Gaussian data, where the exact denoiser and map are known."""

import math

import pytest
import torch
from torch import nn

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.method_config import (
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    RatioPairs,
    SqrtLevels,
    StopGradTarget,
    TargetEMA,
    UniformPairs,
)
from consistency.objectives import ConsistencyObjective, DenoisingObjective, Nets, Progress
from consistency.objectives.consistency import consistency_target
from consistency.objectives.distance import Distance
from consistency.objectives.labels import drop_labels
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
        "distance": Distance("squared_l2"),
        "weight": "uniform",
        "target": StopGradTarget(),
        "boundary": NOISE.sigma_min,
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
    loss = DenoisingObjective(NOISE, -1.2, 1.2)(
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


@pytest.mark.parametrize("target", [StopGradTarget(), TargetEMA(mu=0.9)])
def test_with_equal_weights_and_levels_the_loss_is_exactly_zero_under_dropout(target):
    # Fails when the two passes see different dropout masks. The gap of q = 1e12 rounds to r = t.
    net = Scale(dropout=0.5)
    twin = Scale(dropout=0.5)
    f, g = (ConsistencyFunction(each, 0.5, 0.002).train() for each in (net, twin))
    tied = objective(path="noise", pairs=RatioPairs(q=1e12, stages=1), target=target)
    torch.manual_seed(0)
    nets = Nets(f, f, None if isinstance(target, StopGradTarget) else g)
    terms = tied(nets, gaussian_batch(64), START, random(64))
    assert torch.count_nonzero(terms.per_sample) == 0
    x, sigma = torch.ones(64, 1, 2, 2), torch.ones(64)
    assert not torch.equal(f(x, sigma), f(x, sigma))  # two masks do differ


def test_dropout_leaves_the_generator_where_the_online_pass_left_it():
    f = ConsistencyFunction(Scale(dropout=0.5), 0.5, 0.002).train()
    torch.manual_seed(3)
    objective(path="noise")(Nets(f, f), gaussian_batch(8), START, random(8))
    after = torch.rand(1)
    torch.manual_seed(3)
    f(torch.zeros(8, 1, 2, 2), torch.ones(8), None)
    assert torch.equal(after, torch.rand(1))


class Blurred(nn.Module):
    """Stands for LPIPS: a distance between features."""

    def forward(self, a, b):
        return nn.functional.avg_pool2d(a - b, 2).square().flatten(1).sum(1)


def test_changing_the_distance_changes_the_gradient():
    gradients = []
    for kind in ("l1", "squared_l2", "pseudo_huber", "lpips"):
        net = Scale()
        f = ConsistencyFunction(net, 0.5, 0.002)
        distance = Distance(kind, lpips=Blurred() if kind == "lpips" else None)
        terms = objective(path="noise", distance=distance)(
            Nets(f, f), gaussian_batch(16), START, random(16)
        )
        terms.per_sample.mean().backward()
        gradients.append(net.a.grad.item())
    assert len({round(g, 9) for g in gradients}) == 4


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


# ---- the target --------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [0.0, 0.002])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_target_at_the_boundary_is_its_input_whatever_the_network_says(boundary, bad):
    asked = []

    def f(x, sigma, labels):
        asked.append(sigma)
        broken = (sigma <= max(boundary, 1e-3)).view(-1, 1, 1, 1)
        return torch.where(broken, bad, 3 * x)

    r = torch.tensor([0.0, boundary, 0.5, 80.0])
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    target = consistency_target(f, x, r, None, boundary)
    assert torch.equal(target[:2], x[:2])
    assert torch.equal(target[2:], 3 * x[2:])
    assert (asked[0] > 0).all()  # a network is never told a level whose logarithm is infinite
    assert torch.equal(asked[0][2:], r[2:])


def test_the_boundary_holds_at_the_first_level_of_a_float32_grid():
    r = karras_sigmas(18, NOISE.sigma_min, NOISE.sigma_max).float()[:1]
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(consistency_target(lambda x, s, y: 7 * x, x, r, None, NOISE.sigma_min), x)


# ---- classes and guidance ----------------------------------------------------------------------


def test_classes_are_hidden_at_the_asked_share_and_nowhere_else():
    labels = torch.arange(20_000) % 10
    hidden = drop_labels(labels, 0.1, random(20_000))
    assert torch.equal(hidden[hidden >= 0], labels[hidden >= 0])
    assert set(hidden[hidden < 0].tolist()) == {-1}
    assert (hidden < 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert drop_labels(labels, 0.0, random(20_000)) is labels
    assert drop_labels(None, 0.1, random(20_000)) is None


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_denoising_hides_classes_only_when_told(share):
    asked = []

    def denoise(x, sigma, labels):
        asked.append(labels)
        return exact_denoiser(x, sigma)

    batch = Batch(gaussian_batch(2000).images, torch.arange(2000) % 10)
    DenoisingObjective(NOISE, -1.2, 1.2, label_dropout=share)(
        Nets(denoise, denoise), batch, START, random(2000)
    )
    assert (asked[0] < 0).float().mean().item() == pytest.approx(share, abs=0.04)


def test_consistency_passes_all_see_the_true_classes():
    asked = []

    def f(x, sigma, labels):
        asked.append(labels)
        return exact_consistency(x, sigma)

    labels = torch.arange(8)
    batch = Batch(gaussian_batch(8).images, labels)
    objective()(Nets(f, f, f, f), batch, START, random(8))
    assert len(asked) == 4  # online, target, and Heun's two questions to the teacher
    assert all(torch.equal(each, labels) for each in asked)


class ClassNet(nn.Module):
    """F = class / 10, and 0.05 without one."""

    def forward(self, x, c_noise, labels):
        shift = torch.where(labels < 0, 0.05, labels.float() / 10)
        return shift.view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("path", ["heun", "euler"])
def test_guidance_of_the_teacher_moves_the_path_by_its_formula(path):
    w = 2.5
    plain, guided_ = objective(path=path), objective(path=path, guidance=w)
    denoiser = plain.teacher_function(ClassNet())

    def by_hand(x, sigma, labels):
        null = denoiser(x, sigma, torch.full_like(labels, -1))
        return (1 - w) * null + w * denoiser(x, sigma, labels)

    batch = Batch(gaussian_batch(16).images, torch.arange(16) % 4)
    losses = [
        shape(
            Nets(exact_consistency, exact_consistency, None, teacher), batch, START, random(16)
        ).per_sample
        for shape, teacher in (
            (guided_, guided_.teacher_function(ClassNet())),
            (plain, by_hand),
            (plain, denoiser),
        )
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-9)
    assert not torch.allclose(losses[0], losses[2], rtol=1e-2)


def test_the_weighted_denoising_loss_is_the_plain_one_balanced():
    def weighted(sigma, x, level, labels):
        return exact_denoiser(x, level, labels), sigma.log()

    nets = Nets(exact_denoiser, exact_denoiser)
    plain = DenoisingObjective(NOISE, -1.2, 1.2)(nets, gaussian_batch(50), START, random(50))
    nets = Nets(exact_denoiser, exact_denoiser, weighted=weighted)
    terms = DenoisingObjective(NOISE, -1.2, 1.2)(nets, gaussian_batch(50), START, random(50))
    expected = plain.per_sample / plain.sigma + plain.sigma.log()
    torch.testing.assert_close(terms.per_sample, expected)
