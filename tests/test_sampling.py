import math

import pytest
import torch

from consistency.parameterization import ConsistencyFunction, Denoiser, guided
from consistency.sampling import (
    from_uint8,
    sample_heun,
    sample_mean_flow,
    sample_multistep,
    sample_noise,
    sample_onestep,
    to_uint8,
)
from consistency.schedules import karras_sigmas

V, EPS, T = 0.25, 0.002, 80.0
SHAPE = (3, 4, 4)


def noise_of(indices, seed=0, shape=SHAPE):
    return lambda draw: sample_noise(seed, indices, shape, draw)


def exact_f(x, sigma, labels):
    """Consistency function of Gaussian data N(0, V)."""
    return x * ((V + EPS**2) / (V + sigma.view(-1, 1, 1, 1) ** 2)).sqrt()


class ZeroNet(torch.nn.Module):
    def forward(self, x, c_noise, labels):
        return torch.zeros_like(x)


class LabelNet(torch.nn.Module):
    """Elementwise, so bitwise independent of the batch; depends on level and class."""

    def forward(self, x, c_noise, labels):
        return torch.sin(3 * x + c_noise.view(-1, 1, 1, 1) + labels.view(-1, 1, 1, 1))


# ---- noise ---------------------------------------------------------------------------------


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = sample_noise(7, range(10), SHAPE)
    assert torch.equal(whole[3:6], sample_noise(7, [3, 4, 5], SHAPE))
    assert torch.equal(whole.flip(0), sample_noise(7, range(9, -1, -1), SHAPE))


def test_seed_index_and_draw_each_change_the_noise():
    base = sample_noise(7, [3], SHAPE, draw=1)
    for other in (
        sample_noise(8, [3], SHAPE, draw=1),
        sample_noise(7, [4], SHAPE, draw=1),
        sample_noise(7, [3], SHAPE, draw=2),
        sample_noise(7 + 2**32, [3], SHAPE, draw=1),
    ):
        assert not torch.equal(base, other)


def test_no_two_of_many_samples_share_their_noise():
    # PyTorch keeps 32 bits of a CPU seed: hashed seeds would collide among this many samples.
    rows = sample_noise(0, range(150_000), (2,))
    assert len(torch.unique(rows, dim=0)) == 150_000


def test_noise_is_standard_normal_and_uncorrelated_between_samples_and_draws():
    first, second = (sample_noise(1, range(300), (3, 16, 16), draw).flatten(1) for draw in (0, 1))
    assert first.mean().item() == pytest.approx(0, abs=0.01)
    assert first.std().item() == pytest.approx(1, abs=0.01)
    assert (first * second).mean().item() == pytest.approx(0, abs=0.01)
    assert (first[1:] * first[:-1]).mean().item() == pytest.approx(0, abs=0.01)


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample_noise(0, range(4), SHAPE)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_the_same_in_every_release():
    golden = [float(v) for v in sample_noise(0, [0, 1], (2,)).flatten()]
    assert golden == pytest.approx(GOLDEN, abs=1e-6)


# ---- consistency sampling ------------------------------------------------------------------


def test_one_step_with_the_exact_f_lands_on_the_data_distribution():
    x = sample_onestep(exact_f, noise_of(range(4)))
    expected = T * sample_noise(0, range(4), SHAPE) * math.sqrt((V + EPS**2) / (V + T**2))
    torch.testing.assert_close(x, expected.clamp(-1, 1))


@pytest.mark.parametrize("sigmas", [[80.0, 0.821], [80.0, 24.4, 5.84, 0.9, 0.661]])
def test_multistep_with_the_exact_f_keeps_the_data_distribution(sigmas):
    # Data so narrow that the clamp never acts; variance is then v + eps^2 at every step.
    v = 0.01

    def narrow_f(x, sigma, labels):
        return x * ((v + EPS**2) / (v + sigma.view(-1, 1, 1, 1) ** 2)).sqrt()

    x = sample_multistep(narrow_f, noise_of(range(500), shape=(3, 8, 8)), sigmas)
    assert x.std().item() == pytest.approx(0.1, rel=0.01)


def test_multistep_adds_the_noise_that_is_missing_at_each_level():
    seen: list[torch.Tensor] = []

    def f(x, sigma, labels):
        seen.append(x)
        return torch.zeros_like(x)

    noise = noise_of([5])
    sample_multistep(f, noise, [80.0, 2.0, EPS])
    assert torch.equal(seen[0], 80 * noise(0))
    torch.testing.assert_close(seen[1], math.sqrt(4 - EPS**2) * noise(1))
    assert torch.equal(seen[2], torch.zeros_like(seen[2]))


def test_outputs_are_clamped_after_every_step():
    seen: list[torch.Tensor] = []

    def f(x, sigma, labels):
        seen.append(x)
        return torch.full_like(x, 7.0)

    x = sample_multistep(f, lambda draw: torch.zeros(1, *SHAPE), [80.0, 1.0])
    assert seen[1].max().item() == 1.0
    assert x.max().item() == 1.0


def test_one_step_is_multistep_of_one_level():
    f = ConsistencyFunction(LabelNet(), 0.5, EPS)
    labels = torch.tensor([0, 1])
    one = sample_onestep(f, noise_of([0, 1]), labels)
    assert torch.equal(one, sample_multistep(f, noise_of([0, 1]), [80.0], labels))


@pytest.mark.parametrize("kind", ["onestep", "multistep", "heun", "churned heun"])
def test_samples_do_not_depend_on_the_batch_size(kind):
    f, denoiser = ConsistencyFunction(LabelNet(), 0.5, EPS), Denoiser(LabelNet(), 0.5)

    def draw(indices):
        noise, labels = noise_of(indices), torch.tensor(indices) % 3
        match kind:
            case "onestep":
                return sample_onestep(f, noise, labels)
            case "multistep":
                return sample_multistep(f, noise, [80.0, 2.0, 0.5], labels)
            case "heun":
                return sample_heun(denoiser, noise, 5, labels)
            case _:
                return sample_heun(denoiser, noise, 5, labels, S_churn=2.0, S_noise=1.003)

    whole = draw(list(range(7)))
    parts = torch.cat([draw([0, 1, 2]), draw([3]), draw([4, 5, 6])])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sigmas", "reason"),
    [
        ([], "start at sigma_max"),
        ([0.821], "start at sigma_max"),
        ([100.0, 1.0], "start at sigma_max"),
        ([80.0, 80.0], "must decrease"),
        ([80.0, 1.0, 2.0], "must decrease"),
        ([80.0, float("nan")], "must decrease"),
        ([80.0, 0.001], "below sigma_min"),
        ([80.0, -1.0], "below sigma_min"),
    ],
)
def test_levels_that_are_not_a_decreasing_list_in_range_are_refused(sigmas, reason):
    with pytest.raises(ValueError, match=reason):
        sample_multistep(exact_f, noise_of([0]), sigmas)


# ---- Heun ----------------------------------------------------------------------------------


def test_heun_sampler_of_gaussian_data_converges_to_the_exact_map():
    noise = noise_of(range(3))
    exact = T * noise(0) * math.sqrt(V / (V + T**2))
    errors = [
        (sample_heun(Denoiser(ZeroNet(), 0.5), noise, N) - exact).norm() / exact.norm()
        for N in (18, 40, 150)
    ]
    # (.52763 / .49999 - 1, ..): the last Euler step from eps to 0 adds 8e-6 only.
    assert [e.item() for e in errors] == pytest.approx([0.0553, 0.00977, 0.00064], rel=0.03)


def test_heun_sampler_takes_twice_the_steps_minus_one_evaluations_on_the_grid():
    asked: list[float] = []

    def denoise(x, sigma, labels):
        assert x.dtype == torch.float64
        asked.append(sigma[0].item())
        return torch.zeros_like(x)

    out = sample_heun(denoise, noise_of([0]), 18)
    grid = karras_sigmas(18, EPS, T).flip(0).tolist()
    assert len(asked) == 35
    assert asked == [grid[0], *(level for level in grid[1:] for _ in range(2))]
    assert out.dtype == torch.float32


def test_churn_keeps_the_data_distribution():
    noise = noise_of(range(400), shape=(1, 8, 8))
    x = sample_heun(Denoiser(ZeroNet(), 0.5), noise, 80, S_churn=20.0, S_min=0.05, S_max=50.0)
    plain = sample_heun(Denoiser(ZeroNet(), 0.5), noise, 80)
    assert x.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs((x * plain).mean().item()) < 0.9 * x.var().item()


def test_churn_outside_its_range_draws_no_noise():
    draws: list[int] = []

    def noise(draw):
        draws.append(draw)
        return sample_noise(0, [0], SHAPE, draw)

    sample_heun(Denoiser(ZeroNet(), 0.5), noise, 10, S_churn=5.0, S_min=100.0)
    assert draws == [0]


def test_samplers_record_no_gradient():
    net = torch.nn.Conv2d(3, 3, 1)

    def model(x, sigma, labels):
        return net(x.float()).to(x.dtype)

    assert not sample_onestep(model, noise_of([0])).requires_grad
    assert not sample_heun(model, noise_of([0]), 3).requires_grad


# ---- MeanFlow ------------------------------------------------------------------------------


def exact_u(z, t, gap, labels):
    """Mean velocity of Gaussian data N(0, V) along z_t = (1 - t) x0 + t e."""
    t, r = t.view(-1, 1, 1, 1), (t - gap).view(-1, 1, 1, 1)

    def spread(t):
        return ((1 - t) ** 2 * V + t**2).sqrt()

    return z * (1 - spread(r) / spread(t)) / (t - r)


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.5], [1.0, 0.9, 0.3, 0.01]])
def test_mean_flow_with_the_exact_velocity_gives_the_same_end_in_any_number_of_steps(times):
    x = sample_mean_flow(exact_u, noise_of(range(4)), times)
    expected = (noise_of(range(4))(0) * math.sqrt(V)).clamp(-1, 1)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_mean_flow_asks_for_each_time_and_the_gap_to_the_next():
    asked = []

    def u(z, t, gap, labels):
        asked.append((t.tolist(), gap.tolist(), labels))
        return torch.zeros_like(z)

    labels = torch.tensor([3, 5])
    sample_mean_flow(u, noise_of([0, 1]), [1.0, 0.5, 0.25], labels)
    assert [t for t, _, _ in asked] == [[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]
    assert [gap for _, gap, _ in asked] == [[0.5, 0.5], [0.25, 0.25], [0.25, 0.25]]
    assert all(given is labels for _, _, given in asked)


def test_mean_flow_clamps_its_end_and_nothing_before():
    seen = []

    def u(z, t, gap, labels):
        seen.append(z)
        return torch.full_like(z, -7.0)

    x = sample_mean_flow(u, lambda draw: torch.zeros(1, *SHAPE), [1.0, 0.5])
    assert seen[1].max().item() == 3.5
    assert x.max().item() == 1.0


def test_mean_flow_samples_do_not_depend_on_the_batch_size():
    def draw(indices):
        return sample_mean_flow(exact_u, noise_of(indices), [1.0, 0.4])

    whole = draw(list(range(5)))
    torch.testing.assert_close(whole, torch.cat([draw([0, 1]), draw([2]), draw([3, 4])]))


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ([], "start at 1"),
        ([0.9], "start at 1"),
        ([80.0, 1.0], "start at 1"),
        ([1.0, 0.0], "above 0"),
        ([1.0, -0.5], "above 0"),
        ([1.0, 1.0], "must decrease"),
        ([1.0, 0.3, 0.6], "must decrease"),
        ([1.0, float("nan"), 0.5], "must decrease"),
    ],
)
def test_times_that_are_not_a_decreasing_list_from_one_are_refused(times, reason):
    with pytest.raises(ValueError, match=reason):
        sample_mean_flow(exact_u, noise_of([0]), times)


# ---- guidance ------------------------------------------------------------------------------


def test_the_guided_teacher_samples_the_combination_of_both_answers():
    denoiser, labels, w = Denoiser(LabelNet(), 0.5), torch.tensor([0, 2]), 2.0

    def by_hand(x, sigma, labels):
        null = denoiser(x, sigma, torch.full_like(labels, -1))
        return (1 - w) * null + w * denoiser(x, sigma, labels)

    noise = noise_of([0, 1])
    got = sample_heun(guided(denoiser, w), noise, 6, labels)
    torch.testing.assert_close(got, sample_heun(by_hand, noise, 6, labels), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, sample_heun(denoiser, noise, 6, labels), atol=1e-2)


# ---- 8 bit ---------------------------------------------------------------------------------


def test_every_8_bit_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, -1, -1, 3)
    x = from_uint8(levels)
    assert x.shape == (2, 3, 16, 16)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), levels)


def test_8_bit_rounds_to_nearest_and_clamps():
    x = torch.tensor([-3.0, -1.0, 0.0, 1 / 255, 1.0, 3.0]).view(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 128, 255, 255]
    near = (torch.arange(256) + 0.4) / 127.5 - 1
    assert to_uint8(near.view(1, 1, 16, 16)).flatten().tolist() == list(range(256))


def test_values_that_are_not_finite_never_become_pixels():
    with pytest.raises(ValueError, match="finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


@pytest.mark.parametrize("bad", [torch.zeros(1, 4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_images_that_are_not_uint8_batches_are_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        from_uint8(bad)


GOLDEN = [0.07555156201124191, -1.531614065170288, 1.6469581127166748, 1.224584937095642]
