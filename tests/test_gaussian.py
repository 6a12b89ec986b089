"""Each objective at its exact solution, on Gaussian data x0 ~ N(0, v) where all is closed form.

The probability-flow ODE is linear there, so D*, f*, TrigFlow's F* and MeanFlow's u* are multiples
of x. v differs from sigma_data^2: else the EDM network is zero and too much cancels.
"""

import math

import pytest
import torch

from consistency.config import NoiseConfig
from consistency.data import Batch
from consistency.method_config import (
    ConstantLevels,
    LognormalPairs,
    RatioPairs,
    SeparateTimes,
    StopGradTarget,
    UniformPairs,
)
from consistency.objectives import (
    ConsistencyObjective,
    DenoisingObjective,
    MeanFlowObjective,
    Nets,
    Progress,
    SCMObjective,
    TruncatedObjective,
)
from consistency.objectives.distance import Distance
from consistency.objectives.jvp import directional_derivative
from consistency.objectives.pairs import draw_pairs
from consistency.schedules import ect_r, edm_weight, karras_sigmas

V, SD = 0.1, 0.5
NOISE = NoiseConfig(sigma_data=SD)
ANGLE = NoiseConfig(sigma_data=SD, c_noise="angle")
START = Progress(0, 1000)
SHAPE = (1, 2, 2)
DIM = 4


def gaussian(count):
    generator = torch.Generator().manual_seed(1)
    return Batch(math.sqrt(V) * torch.randn(count, *SHAPE, generator=generator), None)


def column(per_sample):
    return per_sample.view(-1, 1, 1, 1)


def exact_denoiser(x, sigma, labels=None):
    return V * x / (V + column(sigma) ** 2)


def exact_map(boundary):
    """f*(x, t) = x sqrt((v + eps^2) / (v + t^2)), in float64 so that residuals are the method's."""

    def f(x, sigma, labels=None):
        return x.double() * ((V + boundary**2) / (V + column(sigma).double() ** 2)).sqrt()

    return f


def assert_mean_is(samples, expected, deviations=4.5):
    """Within so many standard errors of the mean of independent samples."""
    samples = samples.double()
    error = samples.std().item() / math.sqrt(len(samples))
    assert abs(samples.mean().item() - expected) < deviations * error


def discrete(**changes):
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


# ---- denoising -----------------------------------------------------------------------------


def test_denoising_at_the_exact_denoiser_leaves_the_posterior_variance(draws):
    nets = Nets(exact_denoiser, exact_denoiser)
    terms = DenoisingObjective(NOISE, -1.2, 1.2)(nets, gaussian(20_000), START, draws(20_000))
    variance = V * terms.sigma**2 / (V + terms.sigma**2)
    # Times the weight; what is left is chi^2 / DIM at every noise level.
    ratio = terms.per_sample / (edm_weight(terms.sigma, SD) * variance)
    assert_mean_is(ratio, 1.0)
    for low in (True, False):
        assert_mean_is(ratio[(terms.sigma < 0.3) == low], 1.0)
    assert ratio.std().item() == pytest.approx(math.sqrt(2 / DIM), rel=0.05)


# ---- the discrete family -------------------------------------------------------------------


def distillation_residual(path, t, r):
    """E (f*(x_t, t) - f*(step(x_t), r))^2 of one coordinate, float64, by hand."""
    slope_t, slope_r, step = t / (V + t**2), r / (V + r**2), r - t
    euler = 1 + step * slope_t
    factor = euler if path == "euler" else 1 + step / 2 * (slope_t + euler * slope_r)
    scale = V + NOISE.sigma_min**2
    f_t, f_r = (scale / (V + t**2)).sqrt(), (scale / (V + r**2)).sqrt()
    return (f_t - f_r * factor) ** 2 * (V + t**2)


@pytest.mark.parametrize("path", ["heun", "euler"])
def test_distillation_at_the_exact_map_leaves_the_predicted_solver_error(path, draws):
    f = exact_map(NOISE.sigma_min)
    nets = Nets(f, f, None, exact_denoiser)
    terms = discrete(path=path)(nets, gaussian(20_000), START, draws(20_000))
    grid = karras_sigmas(18, NOISE.sigma_min, NOISE.sigma_max)
    levels = torch.searchsorted(grid.float(), terms.sigma)
    expected = distillation_residual(path, grid[1:], grid[:-1])[levels - 1]
    # Heun's error in the smallest steps is below the rounding of x in float32.
    shown = expected > 1e-12
    assert shown.float().mean() > 0.7
    assert_mean_is((terms.per_sample.double() / expected)[shown], 1.0)


@pytest.mark.parametrize(("path", "power"), [("heun", 3), ("euler", 2)])
def test_the_solver_error_of_a_step_falls_with_its_order(path, power, draws):
    f = exact_map(NOISE.sigma_min)

    def residual(N):
        objective = discrete(path=path, pairs=UniformPairs(levels=ConstantLevels(N=N)))
        nets = Nets(f, f, None, exact_denoiser)
        return objective(nets, gaussian(4000), START, draws(4000)).per_sample.mean().sqrt().item()

    slope = math.log(residual(40) / residual(120)) / math.log(3)
    assert slope == pytest.approx(power, abs=0.25)


def isolation_residual(t, r, boundary):
    """E (f*(x0 + t z, t) - f*(x0 + r z, r))^2 = 2 (v + eps^2) (1 - correlation of x_t and x_r)."""
    t, r = t.double(), r.double()
    # 1 - c = (1 - c^2) / (1 + c): the correlation is within 1e-6 of 1 on fine grids.
    product = (V + t**2) * (V + r**2)
    correlation = (V + t * r) / product.sqrt()
    return 2 * (V + boundary**2) * V * (t - r) ** 2 / product / (1 + correlation)


def test_isolation_at_the_exact_map_leaves_the_predicted_variance(draws):
    f = exact_map(NOISE.sigma_min)
    pairs = LognormalPairs(levels=ConstantLevels(N=81))
    objective = discrete(path="noise", pairs=pairs, weight="inverse_gap")
    terms = objective(Nets(f, f), gaussian(20_000), START, draws(20_000))
    drawn = draw_pairs(pairs, NOISE, START, draws(20_000))
    assert torch.equal(drawn.t, terms.sigma)
    expected = isolation_residual(drawn.t, drawn.r, NOISE.sigma_min) / (drawn.t - drawn.r)
    assert_mean_is(terms.per_sample / expected, 1.0)


@pytest.mark.parametrize("images", [0, 500, 999])
def test_easy_tuning_at_the_exact_map_leaves_the_predicted_norm(images, draws):
    pairs, progress = RatioPairs(), Progress(images, 1000)
    f = exact_map(0.0)
    norm = Distance("pseudo_huber", huber_c=0.0)
    objective = discrete(
        path="noise", pairs=pairs, weight="inverse_gap", distance=norm, boundary=0.0
    )
    terms = objective(Nets(f, f), gaussian(20_000), progress, draws(20_000))
    r = ect_r(terms.sigma, images * 8 // 1000, 2.0)
    # Mean length of DIM normal numbers.
    length = math.sqrt(2) * math.gamma((DIM + 1) / 2) / math.gamma(DIM / 2)
    expected = length * isolation_residual(terms.sigma, r, 0.0).sqrt() / (terms.sigma - r)
    assert_mean_is(terms.per_sample / expected, 1.0)


@pytest.mark.parametrize("N", [11, 41])
def test_the_bias_of_isolation_is_the_error_of_an_euler_step(N, draws):
    """E[x_r | x_t] is the Euler step of the exact teacher, so theta* is off by O(dt^2) a step."""
    seen = {}

    def online(x, sigma, labels):
        seen["x_t"] = x.double()
        return exact_map(NOISE.sigma_min)(x, sigma)

    def target(x, sigma, labels):
        seen["target"], seen["r"] = exact_map(NOISE.sigma_min)(x, sigma), sigma.double()
        return seen["target"]

    pairs = UniformPairs(levels=ConstantLevels(N=N))
    objective = discrete(path="noise", pairs=pairs)
    terms = objective(Nets(online, target), gaussian(40_000), START, draws(40_000))
    t, r, x_t = terms.sigma.double(), seen["r"], seen["x_t"]
    euler = x_t * column((V + t * r) / (V + t**2))
    expected = exact_map(NOISE.sigma_min)(euler, r)
    inside = r > NOISE.sigma_min
    # The slope of the target's surprise on x_t, each level made comparable by its deviation.
    surprise = ((seen["target"] - expected) * x_t).flatten(1).mean(1) / (t - r)
    assert_mean_is(surprise[inside], 0.0)
    # It is a bias: the target's mean differs from f*(x_t, t).
    bias = ((expected - exact_map(NOISE.sigma_min)(x_t, t)) * x_t).flatten(1).mean(1)
    assert (bias[inside] < 0).all() or (bias[inside] > 0).all()


def test_truncated_training_at_the_exact_map_leaves_the_predicted_norm(draws):
    f = exact_map(0.0)
    objective = TruncatedObjective(
        NOISE, 1.0, 0.01, 0.0, 0.2, 2.0, 4, 8.0, 1.0, None,
        Distance("pseudo_huber", huber_c=0.0), "inverse_gap", 0.0, 0.25, 0.1,
    )  # fmt: skip
    total = 20_000
    terms = objective(Nets(f, f, None, f), gaussian(total), START, draws(total))
    t = terms.sigma
    r = ect_r(t, 4, 2.0)
    length = math.sqrt(2) * math.gamma((DIM + 1) / 2) / math.gamma(DIM / 2)
    expected = length * isolation_residual(t, r, 0.0).sqrt() / (t - r)
    share = torch.where(torch.arange(total) < total // 4, 0.1 * 4, 4 / 3)
    assert_mean_is(terms.per_sample / (share * expected), 1.0)


# ---- sCM -----------------------------------------------------------------------------------


def angle_of(c_noise, noise):
    c_noise = column(c_noise.double())
    return c_noise if noise.c_noise == "angle" else torch.atan((4 * c_noise).exp() / SD)


def variance(t):
    """Of a coordinate of x_t = cos(t) x0 + sin(t) z, z ~ N(0, sigma_data^2)."""
    return t.cos() ** 2 * V + t.sin() ** 2 * SD**2


def exact_F(noise):
    """From f* = x_t sqrt(v / m(t)) = cos(t) x_t - sin(t) sd F."""

    def F(u, c_noise, labels=None):
        t = angle_of(c_noise, noise)
        return (u.double() * (t.cos() - (V / variance(t)).sqrt()) / t.sin()).float()

    return F


def exact_velocity(noise):
    """dx_t/dt / sd = u m'(t) / (2 m(t)) along the ODE: the ideal TrigFlow teacher."""

    def F(u, c_noise, labels=None):
        t = angle_of(c_noise, noise)
        return (u.double() * t.sin() * t.cos() * (SD**2 - V) / variance(t)).float()

    return F


def scm(noise, **changes):
    parts = {
        "noise": noise,
        "path": "teacher",
        "P_mean": -1.0,
        "P_std": 1.4,
        "tangent": "clip",
        "tangent_c": 0.1,
        "tangent_norm": "l2",
        "tangent_warmup_images": 0,
        "adaptive_weight": False,
        "prior_weight": "uniform",
    }
    return SCMObjective(**{**parts, **changes})


@pytest.mark.parametrize("noise", [NOISE, ANGLE], ids=["log_sigma", "angle"])
def test_the_tangent_of_continuous_distillation_vanishes_at_the_exact_map(noise, draws):
    F, teacher = exact_F(noise), exact_velocity(noise)
    terms = scm(noise)(Nets(F, F, None, teacher), gaussian(4000), START, draws(4000))
    assert terms.per_sample.max().sqrt().item() < 1e-5
    # And not elsewhere: the teacher itself is the exact F of a denoiser, not of the map.
    other = scm(noise)(Nets(teacher, teacher, None, teacher), gaussian(4000), START, draws(4000))
    assert other.per_sample.mean().sqrt().item() > 0.05


@pytest.mark.parametrize("noise", [NOISE, ANGLE], ids=["log_sigma", "angle"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_tangent_of_continuous_training_vanishes_on_average(noise, exact, draws):
    function = exact_F(noise) if exact else exact_velocity(noise)
    seen = {}

    def online(u, c_noise, labels):
        seen["u"], seen["F"] = u, function(u, c_noise).requires_grad_()
        return seen["F"]

    # Normalisation by |g| + c undone below; with a large c it costs no precision.
    objective = scm(noise, path="noise", tangent="normalize", tangent_c=10.0)
    total = 40_000
    terms = objective(Nets(online, function), gaussian(total), START, draws(total))
    terms.per_sample.sum().backward()
    normalised = -seen["F"].grad * DIM / 2
    length = column(normalised.flatten(1).norm(dim=1))
    g = normalised * 10.0 / (1 - length)
    # g is linear in x_t at each t, so its mean given x_t is 0 exactly if E[g x_t] is.
    moment = (g * seen["u"]).flatten(1).mean(1)
    bins = [terms.sigma < 0.2, (terms.sigma > 0.2) & (terms.sigma < 1), terms.sigma > 1]
    for chosen in bins:
        if exact:
            assert_mean_is(moment[chosen], 0.0)
    if not exact:
        with pytest.raises(AssertionError):
            assert_mean_is(moment[bins[1]], 0.0, deviations=8)


# ---- MeanFlow ------------------------------------------------------------------------------


def spread(t):
    return ((1 - t) ** 2 * V + t**2).sqrt()


def exact_u(z, t, gap, labels=None):
    """z (1 - s(r) / s(t)) / (t - r), written without the division by t - r."""
    z, t, gap = z.double(), column(t.double()), column(gap.double())
    r = t - gap
    return z * ((1 + V) * (t + r) - 2 * V) / (spread(t) * (spread(t) + spread(r)))


def test_the_derivative_of_the_exact_mean_velocity_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    t, r = torch.rand(2, 64, generator=generator).double().sort(0, descending=True).values
    k = torch.randn(64, *SHAPE, generator=generator).double()
    z, gap = k * column(spread(t)), t - r
    slope = (t - (1 - t) * V) / spread(t)  # s'(t); dz/dt = k s'(t)
    u, du = directional_derivative(
        exact_u, (z, t, gap), (k * column(slope), torch.ones_like(t), torch.ones_like(t))
    )
    mean = (spread(t) - spread(r)) / gap
    torch.testing.assert_close(u, k * column(mean), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(du, k * column((slope - mean) / gap), rtol=1e-6, atol=1e-6)
    # MeanFlow's identity u = v - (t - r) du/dt.
    torch.testing.assert_close(u, k * column(slope) - column(gap) * du, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_the_mean_target_of_mean_flow_is_the_exact_mean_velocity(exact, draws):
    def function(z, t, gap, labels=None):
        # The other one ignores the gap: right where r = t, wrong elsewhere.
        return exact_u(z, t, gap if exact else torch.zeros_like(gap)).float()

    seen = {}

    def online(z, t, gap, labels):
        seen.update(z=z, gap=gap, u=function(z, t, gap).requires_grad_())
        return seen["u"]

    objective = MeanFlowObjective(SeparateTimes(), apart=0.75, power=0.0, power_c=1e-3)
    total = 40_000
    terms = objective(Nets(online, function), gaussian(total), START, draws(total))
    terms.per_sample.sum().backward()
    surprise = (seen["u"].grad / 2 * seen["z"]).flatten(1).mean(1)
    tied = seen["gap"] == 0
    assert tied.sum().item() == total // 4
    assert_mean_is(surprise[tied], 0.0)
    if exact:
        for chosen in ((seen["gap"] > 0) & (seen["gap"] < 0.3), seen["gap"] > 0.3):
            assert_mean_is(surprise[chosen], 0.0)
    else:
        with pytest.raises(AssertionError):
            assert_mean_is(surprise[seen["gap"] > 0.3], 0.0, deviations=8)
