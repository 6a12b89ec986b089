import math
import weakref

import numpy as np
import pytest
import torch

from consistency.ema import (
    ema_update_,
    gamma_from_sigma_rel,
    half_life_beta,
    post_hoc_ema,
    post_hoc_weights,
    power_beta,
    power_profile_dot,
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


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_gamma_of_the_published_widths_matches_the_oracle(width, gamma):
    assert gamma_from_sigma_rel(width) == pytest.approx(gamma, abs=0.01)


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


# ---- post-hoc reconstruction ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((1.0, 6.94), (1.0, 6.94)),
        ((0.3, 16.97), (0.7, 2.5)),
        ((2000.0, 0.0), (1500.0, 40.0)),
        ((5.0, 0.0), (8.0, 0.0)),
    ],
)
def test_inner_product_of_profiles_equals_quadrature(a, b):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    end = min(a[0], b[0])
    s = end * (nodes + 1) / 2

    def profile(t, gamma):
        return (gamma + 1) * s**gamma / t ** (gamma + 1)

    integral = (weights * profile(*a) * profile(*b)).sum() * end / 2
    assert power_profile_dot(*a, *b) == pytest.approx(integral, rel=1e-9)
    assert power_profile_dot(*b, *a) == power_profile_dot(*a, *b)


def test_inner_product_neither_overflows_nor_loses_digits_at_extreme_times_and_exponents():
    assert power_profile_dot(1e10, 1000, 1e10, 1000) == pytest.approx(1001**2 / 2001 / 1e10)
    assert power_profile_dot(1.0, 1000, 1e10, 1000) == 0
    ratio = math.exp(1000 * math.log1p(-1e-3))
    expected = 1001 * 7.94 / 1007.94 * ratio / 1e10
    assert power_profile_dot(0.999e10, 6.94, 1e10, 1000) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("profile", [(0, 1), (-1, 1), (1, -0.1), (math.inf, 1), (1, math.nan)])
def test_impossible_profiles_are_refused(profile):
    with pytest.raises(ValueError, match="power profile"):
        power_profile_dot(*profile, 1, 1)


STEPS = 2000
WIDTHS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20)


@pytest.fixture(scope="module")
def run():
    """A random walk far from 0 with its power EMAs: (last weights, {(step, width): average})."""
    generator = torch.Generator().manual_seed(0)
    weights = 100 * torch.randn(50, generator=generator)
    averages, kept = {width: torch.zeros(50) for width in WIDTHS}, {}
    for step in range(1, STEPS + 1):
        weights += torch.randn(50, generator=generator)
        for width, average in averages.items():
            ema_update_([average], [weights], power_beta(step, gamma_from_sigma_rel(width)))
        if step % (STEPS // 32) == 0 or step == STEPS:
            kept |= {(step, width): average.clone() for width, average in averages.items()}
    return weights, kept


def snapshots_of(kept, number):
    """`number` even times x the widths .05 and .10, as (t, gamma, load)."""
    times = sorted({step for step, _ in kept})[-1 :: -32 // number]
    return [
        (step, gamma_from_sigma_rel(width), lambda step=step, width=width: {"w": kept[step, width]})
        for step in times
        for width in (0.05, 0.10)
    ]


def relative_error(run, number, width):
    last, kept = run
    rebuilt = post_hoc_ema(snapshots_of(kept, number), STEPS, gamma_from_sigma_rel(width))["w"]
    tracked = kept[STEPS, width]
    return ((rebuilt - tracked).norm() / (tracked - last).norm()).item()


@pytest.mark.parametrize(
    ("number", "width", "bound"),
    # Of the distance between the tracked average and the last weights; measured: .39 %, .03 %,
    # .08 %, .48 % from 16 snapshots and .11 %, .004 %, .007 %, .08 % from 32.
    [
        *[(16, 0.03, 1e-2), (16, 0.07, 1e-3), (16, 0.15, 2e-3), (16, 0.20, 1.5e-2)],
        *[(32, 0.03, 3e-3), (32, 0.07, 2e-4), (32, 0.15, 2e-4), (32, 0.20, 3e-3)],
    ],
)
def test_averages_rebuilt_from_two_widths_are_those_tracked_in_training(run, number, width, bound):
    assert relative_error(run, number, width) < bound


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.20])
def test_the_error_falls_with_the_number_of_snapshots(run, width):
    few, some, many = (relative_error(run, number, width) for number in (4, 8, 16))
    assert few > 2 * some > 4 * many


def test_an_average_at_a_time_between_snapshots_is_rebuilt_too(run):
    kept = run[1]
    middle = sorted({step for step, _ in kept})[-2]  # not among every second one from the last
    assert middle not in {step for step, _, _ in snapshots_of(kept, 16)}
    rebuilt = post_hoc_ema(snapshots_of(kept, 16), middle, gamma_from_sigma_rel(0.15))["w"]
    tracked, last = kept[middle, 0.15], run[0]
    assert (rebuilt - tracked).norm() < 0.05 * (tracked - last).norm()


@pytest.mark.parametrize("width", [0.05, 0.10])
def test_a_profile_that_is_a_snapshot_is_that_snapshot_bit_by_bit(run, width):
    kept = run[1]
    rebuilt = post_hoc_ema(snapshots_of(kept, 16), STEPS, gamma_from_sigma_rel(width))
    assert torch.equal(rebuilt["w"], kept[STEPS, width])


@pytest.mark.parametrize("unit", [1.0, 4096.0, 1e7])
@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.25])
def test_weights_sum_to_one_and_do_not_depend_on_the_unit_of_time(width, unit):
    gammas = [gamma_from_sigma_rel(w) for w in (0.05, 0.10)]
    gamma = gamma_from_sigma_rel(width)

    def weights(unit):
        snapshots = [(unit * 125 * i, g) for i in range(1, 17) for g in gammas]
        return post_hoc_weights(snapshots, unit * 1900, gamma)

    assert weights(unit).dtype == np.float64
    assert weights(unit).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(weights(unit), weights(1.0), rtol=0, atol=1e-9)


def test_weights_are_those_of_the_least_squares_problem_solved_on_a_grid():
    s = (np.arange(200_000) + 0.5) / 200_000

    def profile(t, gamma):
        return np.where(s < t, (gamma + 1) * (s / t) ** gamma / t, 0)

    snapshots = [(t, gamma) for t in (0.25, 0.5, 0.75, 1.0) for gamma in (6.94, 16.97)]
    columns = np.stack([profile(*snapshot) for snapshot in snapshots], axis=1)
    solution = np.linalg.lstsq(columns, profile(1.0, 10.0), rcond=None)[0]
    weights = post_hoc_weights(snapshots, 1.0, 10.0)
    np.testing.assert_allclose(weights, solution / solution.sum(), atol=1e-4)


def test_a_snapshot_held_twice_shares_its_weight():
    once = post_hoc_weights([(1.0, 7.0), (2.0, 7.0)], 2.0, 9.0)
    twice = post_hoc_weights([(1.0, 7.0), (2.0, 7.0), (2.0, 7.0)], 2.0, 9.0)
    np.testing.assert_allclose(twice, [once[0], once[1] / 2, once[1] / 2], rtol=1e-9)


@pytest.mark.parametrize(
    ("snapshots", "t", "message"),
    [
        *[([], 1.0, "got none"), ([(1.0, 7.0), (2.0, 7.0)], 2.1, "outside the snapshots, 1 to 2")],
        *[([(1.0, 7.0)], 0.9, "outside"), ([(1.0, 7.0)], math.nan, "outside")],
        ([(0.0, 7.0), (1.0, 7.0)], 0.5, "power profile"),
    ],
)
def test_averages_that_cannot_be_rebuilt_are_refused(snapshots, t, message):
    with pytest.raises(ValueError, match=message):
        post_hoc_weights(snapshots, t, 9.0)
    with pytest.raises(ValueError, match=message):
        post_hoc_ema([(*snapshot, dict) for snapshot in snapshots], t, 9.0)


def test_rebuilding_holds_one_snapshot_at_a_time_and_loads_none_it_does_not_need():
    alive, loads = weakref.WeakSet(), []

    class Tensors(dict):
        __hash__ = object.__hash__

    def load(name):
        assert not alive
        loads.append(name)
        tensors = Tensors(w=torch.ones(3))
        alive.add(tensors)
        return tensors

    def snapshots():  # any iterable, in any order
        return ((t, 7.0, lambda t=t: load(t)) for t in (2.0, 1.0, 3.0))

    post_hoc_ema(snapshots(), 3.0, 9.0)
    assert loads == [1.0, 2.0, 3.0]
    loads.clear()
    post_hoc_ema(snapshots(), 3.0, 7.0)
    assert loads == [3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rebuilt_tensors_are_float32_constants_stay_and_counters_come_from_the_last(dtype):
    constant = torch.randn(64).to(dtype)

    def load(t):
        return {"constant": constant, "steps": torch.tensor(int(t)), "on": torch.tensor(t > 1)}

    snapshots = [(t, g, lambda t=t: load(t)) for t in (3.0, 1.0, 2.0) for g in (7.0, 17.0)]
    rebuilt = post_hoc_ema(snapshots, 3.0, 4.0)
    assert rebuilt["constant"].dtype == torch.float32
    torch.testing.assert_close(rebuilt["constant"], constant.float(), rtol=1e-7, atol=0)
    assert rebuilt["steps"].dtype == torch.int64
    assert rebuilt["steps"] == 3
    assert rebuilt["on"].item() is True


def test_a_snapshot_from_before_the_run_diverged_can_still_be_had():
    healthy, diverged = torch.ones(2), torch.full((2,), math.nan)
    snapshots = [(1.0, 7.0, lambda: {"w": healthy}), (2.0, 7.0, lambda: {"w": diverged})]
    assert torch.equal(post_hoc_ema(snapshots, 1.0, 7.0)["w"], healthy)


@pytest.mark.parametrize("other", [{"v": torch.ones(3)}, {"w": torch.ones(1)}, {}])
def test_snapshots_of_different_networks_are_refused_rather_than_broadcast(other):
    snapshots = [(1.0, 7.0, lambda: {"w": torch.ones(3)}), (2.0, 7.0, lambda: other)]
    with pytest.raises(ValueError, match="names or shapes"):
        post_hoc_ema(snapshots, 2.0, 9.0)


def test_rebuilding_leaves_the_snapshots_alone(run):
    kept = run[1]
    before = {key: value.clone() for key, value in kept.items()}
    post_hoc_ema(snapshots_of(kept, 8), STEPS, 3.0)
    assert all(torch.equal(kept[key], value) for key, value in before.items())
