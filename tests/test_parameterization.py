import pytest
import torch
from torch import nn

from consistency.parameterization import (
    ConsistencyFunction,
    Denoiser,
    MeanVelocity,
    TrigFlowVelocity,
    boundary_coefficients,
    edm_coefficients,
    guided,
    noise_label,
)
from consistency.schedules import karras_sigmas

EPS = 0.002


class WildNet(nn.Module):
    """Large, input-dependent outputs; records what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.seen: list[torch.Tensor | None] = []

    def forward(self, x, c_noise, labels):
        self.seen = [x, c_noise, labels]
        return 1e4 * self.conv(x) + c_noise.view(-1, 1, 1, 1).exp()


class ZeroNet(nn.Module):
    def forward(self, x, c_noise, labels):
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("sigma", "oracle"),
    [
        (0.1, (0.961538, 0.0980581, 1.96116, -0.575646)),
        (0.5, (0.5, 0.353553, 1.41421, -0.173287)),
        (1.0, (0.2, 0.447214, 0.894427, 0.0)),
        (80.0, (3.9061e-5, 0.49999, 0.0124998, 1.09551)),
    ],
)
def test_edm_coefficients_match_the_oracle(sigma, oracle):
    values = [c.item() for c in edm_coefficients(torch.tensor([sigma]), 0.5)]
    assert values == pytest.approx(oracle, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out"),
    [
        *[(0.1, 0.963005, 0.0960969), (0.5, 0.502004, 0.352139)],
        *[(1.0, 0.200641, 0.446319), (80.0, 3.90629e-5, 0.499978)],
    ],
)
def test_boundary_coefficients_match_the_oracle(sigma, c_skip, c_out):
    values = [c.item() for c in boundary_coefficients(torch.tensor([sigma]), 0.5, EPS)]
    assert values[:2] == pytest.approx([c_skip, c_out], rel=5e-6)
    assert values[2:] == [c.item() for c in edm_coefficients(torch.tensor([sigma]), 0.5)[2:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.29, 0.3])
@pytest.mark.parametrize("sigma_min", [0.002, 0.003, 0.01, 0.0])
def test_boundary_is_exactly_one_and_zero_at_sigma_min(dtype, sigma_data, sigma_min):
    sigma = torch.tensor([sigma_min], dtype=dtype)
    c_skip, c_out, _, c_noise = boundary_coefficients(sigma, sigma_data, sigma_min)
    assert c_skip.item() == 1
    assert c_out.item() == 0
    assert torch.isfinite(c_noise).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_f_at_sigma_min_is_the_identity_for_any_net_and_dtype(dtype, autocast):
    f = ConsistencyFunction(WildNet(), sigma_data=0.5, sigma_min=EPS)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = f(x, torch.full((2,), EPS))
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(out, x.to(out.dtype))


def test_f_is_the_identity_at_the_first_level_of_the_grid():
    f = ConsistencyFunction(WildNet(), sigma_data=0.5, sigma_min=EPS)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = karras_sigmas(18, EPS, 80.0)[:1]
    assert torch.equal(f(x, first), x)
    assert torch.equal(f(x, first.float()), x)


def test_level_zero_of_the_ect_form_returns_the_clean_image_with_finite_gradients():
    f = ConsistencyFunction(WildNet(), sigma_data=0.5, sigma_min=0.0)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = f(x, torch.tensor([0.0, 1.0]))
    assert torch.equal(out[0], x[0])
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in f.parameters())


def test_ect_form_has_the_denoiser_coefficients():
    sigma = karras_sigmas(20, EPS, 80.0)
    torch.testing.assert_close(
        boundary_coefficients(sigma, 0.5, 0.0), edm_coefficients(sigma, 0.5), rtol=1e-14, atol=0
    )


def test_network_input_has_unit_variance_at_every_level():
    generator = torch.Generator().manual_seed(0)
    net = WildNet()
    for sigma in (0.002, 0.5, 80.0):
        x0 = 0.5 * torch.randn(8, 3, 32, 32, generator=generator)
        x = x0 + sigma * torch.randn(8, 3, 32, 32, generator=generator)
        Denoiser(net, 0.5)(x, torch.full((8,), sigma))
        assert net.seen[0].std().item() == pytest.approx(1, abs=0.02)


def test_network_is_told_exact_levels_and_labels_under_autocast():
    net = WildNet()
    sigma = torch.tensor([70.0, 72.0, 75.0, 80.0])
    labels = torch.tensor([0, 1, 2, -1])
    with torch.autocast("cpu", torch.bfloat16):
        out = Denoiser(net, 0.5)(torch.randn(4, 3, 8, 8), sigma, labels)
    _, c_noise, seen_labels = net.seen
    assert c_noise.dtype == torch.float32
    assert torch.equal(c_noise, sigma.log() / 4)
    assert torch.equal(seen_labels, labels)
    assert out.dtype == torch.float32


def test_autocast_changes_only_the_inside_of_the_network():
    denoiser = Denoiser(ZeroNet(), 0.5)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 20.0])
    with torch.autocast("cpu", torch.bfloat16):
        lowered = denoiser(x, sigma)
    assert torch.equal(lowered, denoiser(x, sigma))


def test_zero_network_is_the_exact_denoiser_of_gaussian_data():
    x, sigma = torch.randn(4, 3, 2, 2).double(), torch.tensor([0.002, 0.5, 3.0, 80.0]).double()
    exact = 0.25 * x / (0.25 + sigma.view(-1, 1, 1, 1) ** 2)
    torch.testing.assert_close(Denoiser(ZeroNet(), 0.5)(x, sigma), exact, rtol=1e-14, atol=0)


def test_float64_states_keep_their_precision_around_a_float32_network():
    net = WildNet()
    out = Denoiser(net, 0.5)(torch.randn(1, 3, 4, 4).double(), torch.tensor([1.0]).double())
    assert out.dtype == torch.float64
    assert net.seen[0].dtype == torch.float32


def test_denoiser_and_consistency_function_share_one_state_dict():
    teacher = Denoiser(WildNet(), 0.5)
    student = ConsistencyFunction(WildNet(), 0.5, EPS)
    student.load_state_dict(teacher.state_dict())
    assert all(name.startswith("net.") for name in student.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_rounded_noise_levels_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        edm_coefficients(torch.tensor([80], dtype=dtype), 0.5)


def test_one_level_for_a_whole_batch_is_refused():
    with pytest.raises(ValueError, match="sigma must be"):
        Denoiser(ZeroNet(), 0.5)(torch.zeros(4, 3, 2, 2), torch.tensor([1.0]))


# ---- what the network is told --------------------------------------------------------------


def test_the_two_conventions_tell_the_network_a_quarter_log_or_the_angle():
    sigma = torch.tensor([0.002, 0.5, 80.0]).double()
    torch.testing.assert_close(noise_label(sigma, 0.5), sigma.log() / 4)
    angle = noise_label(sigma, 0.5, "angle")
    torch.testing.assert_close(0.5 * angle.tan(), sigma)
    # atan(160) (methods B6), the largest angle of the published grid.
    assert angle[-1].item() == pytest.approx(1.564546, abs=1e-6)


@pytest.mark.parametrize(
    "wrapper", [Denoiser, lambda *a: ConsistencyFunction(a[0], a[1], EPS, a[2])]
)
def test_the_convention_changes_only_what_the_network_is_told(wrapper):
    net = WildNet()
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 20.0])
    wrapper(net, 0.5, "angle")(x, sigma)
    fed, told, _ = net.seen
    wrapper(net, 0.5, "log_sigma")(x, sigma)
    assert torch.equal(fed, net.seen[0])
    torch.testing.assert_close(told, torch.atan(sigma / 0.5))
    torch.testing.assert_close(net.seen[1], sigma.log() / 4)


@pytest.mark.parametrize("c_noise", ["log_sigma", "angle"])
def test_level_zero_gives_a_finite_label(c_noise):
    assert torch.isfinite(noise_label(torch.zeros(3), 0.5, c_noise)).all()


# ---- TrigFlow and MeanFlow -----------------------------------------------------------------


def test_the_trigflow_velocity_is_minus_the_network_in_float32():
    class Half(nn.Module):
        def forward(self, x, c_noise, labels):
            return (x + c_noise.view(-1, 1, 1, 1)).bfloat16()

    u, t = torch.randn(2, 3, 4, 4), torch.tensor([0.1, 1.5])
    out = TrigFlowVelocity(Half())(u, t)
    assert out.dtype == torch.float32
    assert torch.equal(out, -(u + t.view(-1, 1, 1, 1)).bfloat16().float())


def test_the_mean_velocity_tells_the_network_t_and_the_gap():
    seen = {}

    class Told(nn.Module):
        def forward(self, x, c_noise, labels=None, gap=None):
            seen.update(x=x, c_noise=c_noise, labels=labels, gap=gap)
            return x.bfloat16()

    z, t, gap, labels = torch.randn(2, 3, 4, 4), torch.rand(2), torch.rand(2), torch.tensor([1, -1])
    out = MeanVelocity(Told())(z, t, gap, labels)
    assert out.dtype == torch.float32
    assert seen["x"] is z
    assert seen["c_noise"] is t
    assert seen["gap"] is gap
    assert seen["labels"] is labels


# ---- guidance ------------------------------------------------------------------------------


def by_class(x, sigma, labels):
    return x * sigma.view(-1, 1, 1, 1) + labels.view(-1, 1, 1, 1)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.5, 4.0])
def test_guidance_is_a_combination_of_the_two_answers(w):
    x, sigma, labels = torch.randn(3, 3, 2, 2), torch.rand(3), torch.tensor([4, 0, 2])
    null = by_class(x, sigma, torch.full((3,), -1))
    expected = (1 - w) * null + w * by_class(x, sigma, labels)
    torch.testing.assert_close(guided(by_class, w)(x, sigma, labels), expected)


def test_guidance_of_one_is_the_function_itself_and_any_other_needs_classes():
    assert guided(by_class, 1.0) is by_class
    with pytest.raises(ValueError, match="class labels"):
        guided(by_class, 2.0)(torch.zeros(1, 3, 2, 2), torch.ones(1), None)


def test_guiding_the_null_class_changes_nothing():
    x, sigma, null = torch.randn(3, 3, 2, 2), torch.rand(3), torch.full((3,), -1)
    torch.testing.assert_close(guided(by_class, 3.0)(x, sigma, null), by_class(x, sigma, null))
