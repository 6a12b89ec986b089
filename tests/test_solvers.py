"""Gaussian data N(0, v): denoiser and ODE solution are closed form, so errors are exact."""

import math
from itertools import pairwise

import pytest
import torch

from consistency.schedules import karras_sigmas
from consistency.solvers import euler_step, heun_step

V, EPS, T = 0.25, 0.002, 80.0
EXACT = T * math.sqrt((V + EPS**2) / (V + T**2))


def denoise(x, sigma):
    return V * x / (V + sigma.view((-1,) + (1,) * (x.ndim - 1)) ** 2)


def solve(step, N, dtype=torch.float64):
    x = torch.full((1, 1), T, dtype=dtype)
    levels = karras_sigmas(N, EPS, T).flip(0).to(dtype)
    for sigma, sigma_next in pairwise(levels):
        x = step(denoise, x, sigma, sigma_next)
    return x.item()


def test_exact_solution_is_the_oracle():
    assert pytest.approx(0.499994, abs=5e-7) == EXACT


@pytest.mark.parametrize(
    ("N", "end", "tolerance"),
    [(18, 0.52763, 5e-6), (40, 0.50488, 5e-6), (150, 0.500316, 5e-7), (1000, 0.5000013, 5e-8)],
)
def test_heun_ends_where_the_oracle_says(N, end, tolerance):
    assert solve(heun_step, N) == pytest.approx(end, abs=tolerance)


@pytest.mark.parametrize(
    ("N", "end"), [(18, 0.42304), (40, 0.46486), (150, 0.49055), (1000, 0.49857)]
)
def test_euler_ends_where_the_oracle_says(N, end):
    assert solve(euler_step, N) == pytest.approx(end, abs=5e-6)


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1.0), (heun_step, 2.0)])
def test_halving_the_steps_shows_the_order(step, order):
    coarse, fine = (abs(solve(step, N) - EXACT) for N in (301, 601))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


def test_one_euler_step_with_the_clean_image_moves_along_the_same_noise():
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t, r = torch.rand(2, 4, generator=generator, dtype=torch.float64).sort(0, descending=True)[0]
    t4, r4 = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
    stepped = euler_step(lambda x, sigma: x0, x0 + t4 * z, t, r)
    torch.testing.assert_close(stepped, x0 + r4 * z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_a_step_to_zero_is_the_denoised_image_and_finite(step):
    x = torch.randn(3, 3, 4, 4).double()
    sigma = torch.tensor([EPS, 0.5, T]).double()
    out = step(denoise, x, sigma, torch.zeros(3).double())
    torch.testing.assert_close(out, denoise(x, sigma), rtol=1e-9, atol=1e-12)


def test_heun_mixes_rows_that_end_at_zero_with_rows_that_do_not():
    x = torch.randn(2, 3).double()
    sigma, sigma_next = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.0, 0.1]).double()
    asked: list[torch.Tensor] = []

    def spy(x, sigma):
        asked.append(sigma)
        return denoise(x, sigma)

    mixed = heun_step(spy, x, sigma, sigma_next)
    assert torch.equal(mixed[:1], euler_step(denoise, x[:1], sigma[:1], sigma_next[:1]))
    assert torch.equal(mixed[1:], heun_step(denoise, x[1:], sigma[1:], sigma_next[1:]))
    assert bool((torch.stack(asked) > 0).all()), "no network is ever asked about level 0"


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_scalar_and_per_sample_levels_agree(step):
    x = torch.randn(3, 2, 2)
    scalar = step(denoise, x, torch.tensor(2.0), torch.tensor(1.0))
    assert torch.equal(scalar, step(denoise, x, torch.full((3,), 2.0), torch.full((3,), 1.0)))


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_half_precision_states_are_stepped_in_float32(step):
    x = torch.randn(2, 3, 4, 4).bfloat16()
    sigma, sigma_next = torch.tensor(0.00236), torch.tensor(0.002)
    out = step(denoise, x, sigma, sigma_next)
    assert out.dtype == torch.float32
    assert torch.equal(out, step(denoise, x.float(), sigma, sigma_next))


def test_float32_follows_float64_on_a_fine_grid():
    assert solve(heun_step, 600, torch.float32) == pytest.approx(solve(heun_step, 600), rel=1e-4)
