"""sCM: formulas against a second writing of them, dropout, gradients, guidance."""

import math

import pytest
import torch
from torch import nn

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.objectives import DenoisingObjective, Nets, Progress, SCMObjective
from consistency.objectives import scm as module
from consistency.objectives.scm import label_rate, normalize_tangent, scm_tangent
from consistency.parameterization import (
    ConsistencyFunction,
    Denoiser,
    TrigFlowVelocity,
    noise_label,
)

NOISE, ANGLE = NoiseConfig(), NoiseConfig(c_noise="angle")
START = Progress(0, 1000)
SD = 0.5


class Small(nn.Module):
    """Smooth in x and in the level, with dropout and classes."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(2)
        self.inner = nn.Conv2d(1, 8, 1)
        self.outer = nn.Conv2d(8, 1, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, c_noise, labels=None, gap=None):
        shift = c_noise.view(-1, 1, 1, 1)
        if labels is not None:
            shift = shift + 0.3 * labels.view(-1, 1, 1, 1)
        return self.outer(self.dropout(torch.tanh(self.inner(x) + shift)))


def objective(noise=ANGLE, **changes):
    parts = {
        "noise": noise,
        "path": "noise",
        "P_mean": -1.0,
        "P_std": 1.4,
        "tangent": "normalize",
        "tangent_c": 0.1,
        "tangent_norm": "l2",
        "tangent_warmup_images": 0,
        "adaptive_weight": False,
        "prior_weight": "uniform",
    }
    return SCMObjective(**{**parts, **changes})


def images(count, seed=0):
    return SD * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def column(t):
    return t.view(-1, 1, 1, 1)


def recorded(monkeypatch):
    """What the forward-mode product inside the objective returns."""
    seen = []
    real = module.directional_derivative

    def spy(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "directional_derivative", spy)
    return seen


# ---- formulas ------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_tangent_is_cos_t_times_the_derivative_of_f(rho):
    generator = torch.Generator().manual_seed(0)
    t = 0.05 + 1.4 * torch.rand(50, generator=generator).double()
    x, v = torch.randn(2, 50, 1, 2, 2, generator=generator).double()

    def F(u, t):  # a network, in closed form
        return torch.sin(u + column(t)) + u * column(t)

    cos, sin = column(t.cos()), column(t.sin())
    dF_du, dF_dt = torch.cos(x / SD + column(t)) + column(t), torch.cos(x / SD + column(t)) + x / SD
    dF = dF_du * v / SD + dF_dt
    # d/dt of f = cos(t) x - sin(t) sd F(x / sd, t), the part of F's change weighted by rho.
    velocity = cos * v - cos * SD * F(x / SD, t)
    rest = -sin * x - sin * SD * dF
    g = scm_tangent(F(x / SD, t), cos * sin * dF, x, v, t, SD, rho)
    torch.testing.assert_close(g, cos * (velocity + rho * rest), rtol=1e-12, atol=1e-12)


def test_the_tangent_agrees_with_a_finite_difference_of_f_along_the_path():
    net, eps = Small().double(), 1e-5
    t = torch.linspace(0.05, 1.5, 20).double()
    x0, z = images(20).double(), images(20, 1).double()

    def f(t):
        x = column(t.cos()) * x0 + column(t.sin()) * z
        return column(t.cos()) * x - column(t.sin()) * SD * net(x / SD, t)

    cos, sin = column(t.cos()), column(t.sin())
    x, v = cos * x0 + sin * z, cos * z - sin * x0
    F, F_dot = module.directional_derivative(
        lambda u, c: net(u, c), (x / SD, t), (cos * sin * v / SD, label_rate(t, "angle"))
    )
    g = scm_tangent(F, F_dot, x, v, t, SD, 1.0)
    difference = cos * (f(t + eps) - f(t - eps)) / (2 * eps)
    torch.testing.assert_close(g, difference.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("c_noise", ["log_sigma", "angle"])
def test_the_rate_of_the_level_is_the_derivative_of_the_label(c_noise):
    t, eps = torch.linspace(0.01, 1.56, 50).double(), 1e-7
    labels = [noise_label(SD * torch.tan(t + step), SD, c_noise) for step in (eps, -eps)]
    rate = t.cos() * t.sin() * (labels[0] - labels[1]) / (2 * eps)
    torch.testing.assert_close(label_rate(t, c_noise), rate, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_normalisation_divides_by_the_length_of_the_sample(norm):
    g = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for row, normalised in zip(g, normalize_tangent(g, 0.1, norm), strict=True):
        length = math.sqrt((row**2).sum().item() / (48 if norm == "rms" else 1))
        torch.testing.assert_close(normalised, row / (length + 0.1))
    assert torch.count_nonzero(normalize_tangent(torch.zeros(2, 1, 2, 2))) == 0


def terms_and_g(shape, draws, progress=START, count=32):
    """The loss and the g that its gradient shows: loss = mean((F - F- - g)^2), F = F-."""
    net = TrigFlowVelocity(Small())
    seen = {}

    def online(u, c_noise, labels):
        seen["F"] = net(u, c_noise, labels).detach().requires_grad_()
        return seen["F"]

    terms = shape(Nets(online, net), Batch(images(count), None), progress, draws(count))
    terms.per_sample.sum().backward()
    return terms, -seen["F"].grad * 16 / 2


def raw(draws, progress=START, **changes):
    """g before it is normalised: a large c undone."""
    _, g = terms_and_g(objective(tangent_c=1e3, **changes), draws, progress)
    return g * 1e3 / (1 - column(g.flatten(1).norm(dim=1)))


def test_clipping_and_normalising_act_on_the_same_tangent(draws):
    g = raw(draws)
    _, clipped = terms_and_g(objective(tangent="clip"), draws)
    torch.testing.assert_close(clipped, g.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    for norm in ("l2", "rms"):
        terms, normalised = terms_and_g(objective(tangent_norm=norm), draws)
        torch.testing.assert_close(
            normalised, normalize_tangent(g, 0.1, norm), rtol=1e-3, atol=1e-4
        )
        expected = normalised.square().flatten(1).mean(1)
        torch.testing.assert_close(terms.per_sample, expected, rtol=1e-4, atol=1e-6)


def test_the_warm_up_brings_in_the_change_of_F_linearly(draws):
    start, half, end = (
        raw(draws, Progress(images, 1000), tangent_warmup_images=200) for images in (0, 100, 200)
    )
    torch.testing.assert_close(half, (start + end) / 2, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(end, raw(draws), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(start, end, atol=0.1)
    terms, _ = terms_and_g(objective(tangent_warmup_images=200), draws, Progress(50, 1000))
    assert terms.metrics == {"tangent_warmup": 0.25}


def test_the_prior_weight_divides_the_loss_by_sigma(draws):
    plain, _ = terms_and_g(objective(), draws)
    weighted, _ = terms_and_g(objective(prior_weight="inverse_sigma"), draws)
    torch.testing.assert_close(weighted.per_sample, plain.per_sample / plain.sigma)


def test_the_adaptive_weight_balances_the_loss(draws):
    net = TrigFlowVelocity(Small())

    def weighted(sigma, *inputs):
        return net(*inputs), 0.1 * sigma.log()

    batch = Batch(images(32), None)
    plain = objective()(Nets(net, net), batch, START, draws(32))
    terms = objective()(Nets(net, net, weighted=weighted), batch, START, draws(32))
    u = 0.1 * plain.sigma.log()
    torch.testing.assert_close(terms.per_sample, plain.per_sample * torch.exp(-u) + u)


# ---- TrigFlow is EDM -----------------------------------------------------------------------


@pytest.mark.parametrize("c_noise", ["log_sigma", "angle"])
def test_the_denoiser_is_the_trigflow_combination_of_the_same_network(c_noise):
    net = Small()
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0])
    x = images(5) + column(sigma) * images(5, 1) / SD
    t = torch.atan(sigma / SD)
    x_t = column(t.cos()) * x  # signal scaled to cos(t)
    F = TrigFlowVelocity(net)(x_t / SD, noise_label(sigma, SD, c_noise))
    trig = column(t.cos()) * x_t - column(t.sin()) * SD * F
    torch.testing.assert_close(trig, Denoiser(net, SD, c_noise)(x, sigma), rtol=1e-5, atol=1e-5)
    f = ConsistencyFunction(net, SD, 0.0, c_noise)  # the same form is sCM's f
    torch.testing.assert_close(trig, f(x, sigma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [NOISE, ANGLE], ids=["log_sigma", "angle"])
def test_the_denoising_loss_is_the_trigflow_loss(noise, draws):
    net, count = Small(), 64
    f = Denoiser(net, SD, noise.c_noise)
    terms = DenoisingObjective(noise, -1.2, 1.2)(
        Nets(f, f), Batch(images(count), None), START, draws(count)
    )
    again = draws(count)
    sigma = torch.exp(-1.2 + 1.2 * again.normal())
    z, x0, t = SD * again.normal(1, 4, 4), images(count), torch.atan(sigma / SD)
    cos, sin = column(t.cos()), column(t.sin())
    F = TrigFlowVelocity(net)((cos * x0 + sin * z) / SD, noise_label(sigma, SD, noise.c_noise))
    expected = (F - (cos * z - sin * x0) / SD).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.per_sample, expected, rtol=1e-4, atol=1e-5)


# ---- properties ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["noise", "teacher"])
def test_the_product_sees_the_dropout_masks_of_the_online_pass(path, monkeypatch, draws):
    seen = recorded(monkeypatch)
    net = TrigFlowVelocity(Small(dropout=0.5)).train()
    outputs = []

    def online(*inputs):
        outputs.append(net(*inputs))
        return outputs[-1]

    objective(path=path)(Nets(online, net, None, net), Batch(images(16), None), START, draws(16))
    torch.testing.assert_close(seen[0][0], outputs[0].detach(), rtol=1e-6, atol=1e-6)
    u = images(16)
    assert not torch.equal(net(u, torch.ones(16)), net(u, torch.ones(16)))


def test_only_the_online_pass_carries_gradients(draws):
    online, detached, teacher = (TrigFlowVelocity(Small()) for _ in range(3))
    nets = Nets(online, detached, None, teacher)
    shape = objective(path="teacher")
    shape(nets, Batch(images(8), None), START, draws(8)).per_sample.sum().backward()
    assert all(p.grad is not None for p in online.parameters())
    assert all(p.grad is None for net in (detached, teacher) for p in net.parameters())


def test_guidance_mixes_the_teachers_velocities_by_its_formula(draws):
    w, teacher, student = 2.0, TrigFlowVelocity(Small()), TrigFlowVelocity(Small())
    labels = torch.arange(16) % 3
    batch = Batch(images(16), labels)

    def by_hand(u, c_noise, labels):
        null = teacher(u, c_noise, torch.full_like(labels, -1))
        return (1 - w) * null + w * teacher(u, c_noise, labels)

    def loss(shape, asked):
        nets = Nets(student, student, None, asked)
        return shape(nets, batch, START, draws(16)).per_sample

    plain, guided = objective(path="teacher"), objective(path="teacher", guidance=w)
    got = loss(guided, guided.teacher_function(teacher.net))
    torch.testing.assert_close(got, loss(plain, by_hand), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got, loss(plain, teacher), rtol=1e-2)


def test_two_ranks_see_together_what_one_sees_alone(draws):
    net = TrigFlowVelocity(Small())
    whole = Batch(images(10), None)
    alone = objective()(Nets(net, net), whole, START, draws(10)).per_sample
    parts = [
        objective()(Nets(net, net), Batch(whole.images[a:b], None), START, draws(10, 0, a, b))
        for a, b in ((0, 4), (4, 10))
    ]
    torch.testing.assert_close(alone, torch.cat([part.per_sample for part in parts]))
