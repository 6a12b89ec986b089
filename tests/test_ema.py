import pytest
import torch

from consistency.ema import (
    ema_update_,
    gamma_from_sigma_rel,
    half_life_beta,
    power_beta,
    sigma_rel,
)


def test_half_life_beta_matches_the_oracle_of_edm():
    assert half_life_beta(512, 500_000) == pytest.approx(0.99929047, abs=5e-9)


def test_half_life_means_the_same_at_any_batch_size():
    assert half_life_beta(64, 500_000) ** 8 == pytest.approx(half_life_beta(512, 500_000))


def test_ramp_shortens_the_half_life_early_and_lets_go_later():
    assert half_life_beta(512, 500_000, images_seen=0, ramp=0.05) == 0
    early = half_life_beta(512, 500_000, images_seen=100_000, ramp=0.05)
    assert early == pytest.approx(0.5 ** (512 / 5_000))
    late = half_life_beta(512, 500_000, images_seen=20_000_000, ramp=0.05)
    assert late == half_life_beta(512, 500_000)


def test_a_ramp_without_images_seen_is_refused():
    with pytest.raises(ValueError, match="images_seen"):
        half_life_beta(512, 500_000, ramp=0.05)


@pytest.mark.parametrize(("gamma", "width"), [(6.94, 0.09997), (16.97, 0.05001)])
def test_sigma_rel_matches_the_oracle(gamma, width):
    assert sigma_rel(gamma) == pytest.approx(width, abs=6e-6)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25, 12**-0.5])
def test_gamma_is_the_inverse_of_sigma_rel(width):
    assert sigma_rel(gamma_from_sigma_rel(width)) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3])
def test_impossible_widths_are_refused(width):
    with pytest.raises(ValueError, match="sigma_rel"):
        gamma_from_sigma_rel(width)


def test_power_average_weighs_step_i_like_i_to_the_gamma():
    gamma, steps = 6.94, 400
    average = torch.zeros(1)
    for step in range(1, steps + 1):
        ema_update_([average], [torch.tensor([float(step)])], power_beta(step, gamma))
    weights = torch.arange(1, steps + 1, dtype=torch.float64) ** gamma
    mean = (weights * torch.arange(1, steps + 1)).sum() / weights.sum()
    assert average.item() == pytest.approx(mean.item(), rel=2e-3)


def test_power_average_starts_from_the_first_value_alone():
    assert power_beta(1, 6.94) == 0
    with pytest.raises(ValueError, match="from 1"):
        power_beta(0, 6.94)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_average_of_a_constant_does_not_stall(dtype):
    average, value = torch.full((1,), 0.99), torch.ones(1, dtype=dtype)
    for _ in range(20_000):
        ema_update_([average], [value], 0.9999)
    assert average.item() == pytest.approx(0.99865, abs=3e-5)  # half precision stops at .988, .990


def test_update_is_the_formula_in_place_and_leaves_the_values():
    generator = torch.Generator().manual_seed(0)
    averages = [torch.randn(3, 2, generator=generator), torch.randn(5, generator=generator)]
    values = [torch.randn(3, 2, generator=generator), torch.randn(5, generator=generator)]
    expected = [0.9 * a + 0.1 * v for a, v in zip(averages, values, strict=True)]
    kept, storage = [v.clone() for v in values], averages[0].data_ptr()
    ema_update_(averages, values, 0.9)
    torch.testing.assert_close(averages, expected)
    assert averages[0].data_ptr() == storage
    assert all(torch.equal(v, k) for v, k in zip(values, kept, strict=True))


def test_decay_zero_copies_and_decay_one_keeps_exactly():
    value = torch.randn(100)
    average = torch.randn(100)
    kept = average.clone()
    ema_update_([average], [value], 1.0)
    assert torch.equal(average, kept)
    ema_update_([average], [value], 0.0)
    assert torch.equal(average, value)


def test_update_of_parameters_records_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(2))
    average = torch.zeros(2)
    ema_update_([average], [parameter], 0.5)
    assert not average.requires_grad
    assert average.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_averages_other_than_float32_are_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        ema_update_([torch.zeros(2, dtype=dtype)], [torch.zeros(2, dtype=dtype)], 0.9)


@pytest.mark.parametrize("values", [[torch.zeros(1)], [torch.zeros(2), torch.zeros(2)], []])
def test_values_that_do_not_match_are_refused_rather_than_broadcast(values):
    with pytest.raises(ValueError, match="agree"):
        ema_update_([torch.zeros(2)], values, 0.9)


@pytest.mark.parametrize("beta", [-0.1, 1.0001, float("nan")])
def test_decays_outside_zero_to_one_are_refused(beta):
    with pytest.raises(ValueError, match="decay"):
        ema_update_([torch.zeros(2)], [torch.zeros(2)], beta)


def test_no_tensors_is_no_work():
    ema_update_([], [], 0.9)
