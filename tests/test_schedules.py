import math

import pytest
import torch

from consistency.parameterization import edm_coefficients
from consistency.schedules import (
    angle_to_sigma,
    ect_r,
    ect_stage,
    edm_weight,
    inverse_gap_weight,
    karras_sigmas,
    lognormal_index_probabilities,
    lognormal_sigmas,
    lr_factor,
    mu_adaptive,
    num_levels_doubling,
    num_levels_sqrt,
    sigma_to_angle,
    truncated_student_t_sigmas,
)

EPS, T = 0.002, 80.0
PROGRESS = [0, 10, 50, 100, 250, 500, 750, 1000]  # of K = 1000


def test_karras_grid_of_18_levels_matches_the_oracle():
    oracle = [
        *(0.002, 0.007528, 0.022935, 0.059947, 0.13952, 0.29644, 0.58535, 1.0882, 1.9233),
        *(3.2568, 5.3152, 8.4009, 12.91, 19.352, 28.375, 40.786, 57.586, 80.0),
    ]
    assert karras_sigmas(18, EPS, T).tolist() == pytest.approx(oracle, rel=1e-4)


@pytest.mark.parametrize("N", [2, 18, 151, 1281])
def test_grid_is_float64_ascending_and_exact_at_both_ends(N):
    sigmas = karras_sigmas(N, EPS, T)
    assert sigmas.shape == (N,)
    assert sigmas.dtype == torch.float64
    assert sigmas[0].item() == EPS
    assert sigmas[-1].item() == T
    assert bool((sigmas.diff() > 0).all())


@pytest.mark.parametrize(("N", "gap"), [(11, 1.5e-2), (151, 3.6e-4), (1281, 3.9e-5)])
def test_first_interval_of_the_grid_keeps_its_tiny_width(N, gap):
    assert karras_sigmas(N, EPS, T)[:2].diff().item() == pytest.approx(gap, rel=0.03)


@pytest.mark.parametrize(("N", "gap"), [(18, 0.46), (151, 0.066), (1281, 0.0080)])
def test_relative_gap_near_sigma_one_matches_the_oracle(N, gap):
    sigmas = karras_sigmas(N, EPS, T)
    upper = int((sigmas - 1).abs().argmin())
    assert 1 - (sigmas[upper - 1] / sigmas[upper]).item() == pytest.approx(gap, rel=0.03)


@pytest.mark.parametrize(
    ("N", "index", "sigma"),
    [
        *[(40, 22, 1.382), (201, 106, 1.913), (40, 17, 4.366), (40, 18, 3.520)],
        *[(151, 67, 3.991), (151, 62, 5.249), (18, 11, 0.585)],
        *[(40, 16, 5.38), (40, 20, 2.24)],  # stroke editing, to two digits
    ],
)
def test_published_two_step_indices_name_these_sigmas_on_the_descending_grid(N, index, sigma):
    assert karras_sigmas(N, EPS, T).flip(0)[index].item() == pytest.approx(sigma, abs=6e-4)


@pytest.mark.parametrize(
    ("N", "low", "high"), [(1, EPS, T), (18, 0.0, T), (18, 2.0, 1.0), (18, 1.0, math.inf)]
)
def test_grid_refuses_one_point_zero_levels_and_empty_ranges(N, low, high):
    with pytest.raises(ValueError, match=r"grid|sigma_min"):
        karras_sigmas(N, low, high)


@pytest.mark.parametrize(
    ("s0", "s1", "mu0", "levels", "mus"),
    [
        (
            *(2, 150, 0.9, [2, 16, 34, 48, 76, 107, 131, 151]),
            [0.9, 0.9869, 0.9938, 0.9956, 0.9972, 0.9980, 0.9984, 0.9986],
        ),
        (
            *(2, 200, 0.95, [2, 21, 45, 64, 101, 143, 175, 201]),
            [0.95, 0.9951, 0.9977, 0.9984, 0.9990, 0.9993, 0.9994, 0.9995],
        ),
    ],
)
def test_levels_and_mu_of_2023_match_the_tables(s0, s1, mu0, levels, mus):
    assert [num_levels_sqrt(k, 1000, s0, s1) for k in PROGRESS] == levels
    assert [mu_adaptive(N, s0, mu0) for N in levels] == pytest.approx(mus, abs=6e-5)


def test_openai_mu_differs_at_the_start_and_hardly_later():
    assert mu_adaptive(2, 2, 0.9, "openai") == pytest.approx(0.81)
    assert mu_adaptive(2, 2, 0.95, "openai") == pytest.approx(0.9025)
    for s1, mu0 in ((150, 0.9), (200, 0.95)):
        for N in {num_levels_sqrt(k, 1000, 2, s1) for k in range(10, 1001)}:
            assert abs(mu_adaptive(N, 2, mu0, "openai") - mu_adaptive(N, 2, mu0)) < 1e-3


def test_unknown_mu_variant_is_refused():
    with pytest.raises(ValueError, match="'paper' or 'openai'"):
        mu_adaptive(18, 2, 0.9, "jcm")


def test_doubling_levels_match_the_oracle_of_400k_steps():
    stages = [num_levels_doubling(k, 400_000, 10, 1280) for k in range(0, 400_000, 50_000)]
    assert stages == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert num_levels_doubling(49_999, 400_000, 10, 1280) == 11


@pytest.mark.parametrize("schedule", [num_levels_sqrt, num_levels_doubling])
def test_number_of_levels_stays_put_past_the_end(schedule):
    assert schedule(1200, 1000, 2, 150) == schedule(1000, 1000, 2, 150) == 151


@pytest.mark.parametrize("schedule", [num_levels_sqrt, num_levels_doubling])
def test_number_of_levels_is_the_same_counted_in_images(schedule):
    in_steps = [schedule(k, 4000, 10, 1280) for k in range(0, 4400, 37)]
    in_images = [schedule(k * 512, 4000 * 512, 10, 1280) for k in range(0, 4400, 37)]
    assert in_steps == in_images
    assert in_steps == sorted(in_steps)


def test_doubling_a_run_shorter_than_its_stages_ends_at_s1():
    assert num_levels_doubling(3, 3, 10, 1280) <= 1281
    assert num_levels_doubling(0, 3, 10, 10) == 11


@pytest.mark.parametrize(("k", "K", "s0", "s1"), [(-1, 10, 2, 150), (0, 0, 2, 150), (0, 9, 20, 10)])
def test_impossible_curricula_are_refused(k, K, s0, s1):
    with pytest.raises(ValueError, match="need"):
        num_levels_sqrt(k, K, s0, s1)
    with pytest.raises(ValueError, match="need"):
        num_levels_doubling(k, K, s0, s1)


def test_ict_index_law_and_weights_match_the_oracle():
    sigmas = karras_sigmas(11, EPS, T)
    law = [0.0626, 0.1817, 0.2455, 0.2135, 0.1424, 0.0806, 0.0411, 0.0196, 0.0089, 0.0040]
    weights = [67.93, 14.63, 4.288, 1.545, 0.6452, 0.3009, 0.1528, 0.08315, 0.04783, 0.02883]
    probabilities = lognormal_index_probabilities(sigmas, -1.1, 2.0)
    assert probabilities.tolist() == pytest.approx(law, abs=6e-5)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert inverse_gap_weight(sigmas[1:], sigmas[:-1]).tolist() == pytest.approx(weights, rel=1e-3)


def test_weight_of_the_finest_published_grid_reaches_26_thousand():
    sigmas = karras_sigmas(1281, EPS, T)
    weights = inverse_gap_weight(sigmas[1:], sigmas[:-1])
    assert weights.max().item() == pytest.approx(2.6e4, rel=0.02)


def test_index_law_refuses_a_descending_grid():
    with pytest.raises(ValueError, match="ascend"):
        lognormal_index_probabilities(karras_sigmas(11, EPS, T).flip(0), -1.1, 2.0)


def test_lognormal_sigmas_have_the_mean_and_width_of_ln_sigma():
    draw = lognormal_sigmas(200_000, -1.2, 1.2, torch.Generator().manual_seed(0), "cpu")
    assert draw.dtype == torch.float32
    assert draw.log().mean().item() == pytest.approx(-1.2, abs=0.01)
    assert draw.log().std().item() == pytest.approx(1.2, abs=0.01)


def test_lognormal_sigmas_depend_on_the_generator_alone():
    first = lognormal_sigmas(5, -1.1, 2.0, torch.Generator().manual_seed(3), "cpu")
    torch.manual_seed(99)
    again = lognormal_sigmas(5, -1.1, 2.0, torch.Generator().manual_seed(3), "cpu")
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("stage", "t", "ratio"),
    [
        *[
            (0, 0.5, 0.0),
            (0, 1.0, 0.0),
            (0, 2.0, 0.0232),
            (0, 5.0, 0.4732),
            (0, 20.0, 0.5),
            (0, 80, 0.5),
        ],
        *[(2, 0.1, 0.400), (2, 1.0, 0.606), (2, 5.0, 0.868)],
        *[(7, 0.1, 0.9812), (7, 1.0, 0.9877), (7, 5.0, 0.9959), (7, 80.0, 0.9961)],
    ],
)
def test_ect_ratio_matches_the_oracle(stage, t, ratio):
    r = ect_r(torch.tensor(t, dtype=torch.float64), stage, q=2)
    assert r.item() / t == pytest.approx(ratio, abs=6e-4)


def test_ect_single_stage_of_q_256_is_the_last_of_eight_of_q_2():
    t = torch.logspace(-3, 2, 50, dtype=torch.float64)
    assert torch.equal(ect_r(t, 0, q=256), ect_r(t, 7, q=2))


def test_ect_r_is_exactly_zero_or_positive_and_below_t():
    t = torch.logspace(-4, 2, 400)
    for stage in range(8):
        r = ect_r(t, stage, q=2)
        assert bool((r >= 0).all())
        assert bool((r < t).all())
    assert bool((ect_r(t, 0, q=2)[t <= 1] == 0).all())
    assert torch.isfinite(inverse_gap_weight(t, ect_r(t, 0, q=2))).all()


def test_ect_max_ratio_stops_the_gap_from_shrinking():
    t = torch.logspace(-2, 1.9, 30, dtype=torch.float64)
    cap = 1 - 1 / 256
    torch.testing.assert_close(ect_r(t, 9, q=4, max_ratio=cap), ect_r(t, 3, q=4))
    assert torch.equal(ect_r(t, 0, q=4, max_ratio=cap), ect_r(t, 0, q=4))


def test_ect_stages_have_equal_length_and_the_last_one_stays():
    assert [ect_stage(k, 800, 8) for k in (0, 99, 100, 799, 800, 5000)] == [0, 0, 1, 7, 7, 7]
    assert [ect_stage(k * 128, 800 * 128, 8) for k in range(900)] == [
        ect_stage(k, 800, 8) for k in range(900)
    ]


@pytest.mark.parametrize(("sigma", "weight"), [(0.1, 104), (0.5, 8), (1, 5), (80, 4.00016)])
def test_edm_weight_matches_the_oracle(sigma, weight):
    assert edm_weight(torch.tensor(sigma), 0.5).item() == pytest.approx(weight, rel=1e-5)


def test_edm_weight_is_the_inverse_square_of_c_out():
    sigma = karras_sigmas(40, EPS, T)
    product = edm_weight(sigma, 0.5) * edm_coefficients(sigma, 0.5)[1] ** 2
    torch.testing.assert_close(product, torch.ones_like(product), rtol=1e-12, atol=0)


def test_learning_rate_warms_up_stays_and_decays_to_zero():
    factors = [lr_factor(images, 1000, 100, 0.5) for images in (0, 50, 100, 500, 750, 1000, 2000)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])


def test_learning_rate_without_warm_up_or_decay_is_constant():
    assert {lr_factor(images, 1000, 0, 1.0) for images in (0, 1, 999, 1000, 5000)} == {1.0}


@pytest.mark.parametrize(
    "arguments", [(0, 0, 0, 1.0), (-1, 10, 0, 1.0), (0, 10, -1, 1.0), (0, 10, 0, 1.5)]
)
def test_impossible_learning_rate_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match=r"need|decay_from"):
        lr_factor(*arguments)
    with pytest.raises(ValueError, match="inverse_sqrt_images"):
        lr_factor(0, 10, 0, 1.0, inverse_sqrt_images=-1)


def test_learning_rate_falls_like_an_inverse_square_root_after_so_many_images():
    factors = [lr_factor(n, 9000, 0, 1.0, inverse_sqrt_images=1000) for n in (0, 999, 4000, 9000)]
    assert factors == pytest.approx([1, 1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("images", [0, 50, 300, 700, 950, 1000, 1100])
def test_inverse_square_root_multiplies_warm_up_and_decay(images):
    alone = lr_factor(images, 1000, 100, 0.5)
    root = lr_factor(images, 1000, 0, 1.0, inverse_sqrt_images=40)
    both = lr_factor(images, 1000, 100, 0.5, inverse_sqrt_images=40)
    assert both == pytest.approx(alone * root)


# ---- the law of TCM ------------------------------------------------------------------------

TCM = {"nu": 0.01, "loc": 0.0, "scale": 0.2, "low": 1.0, "high": 80.0}


@pytest.mark.parametrize(
    "law",
    [
        TCM,
        TCM | {"low": 0.002},
        TCM | {"nu": 2.0, "loc": -1.1, "scale": 2.0, "low": 0.002},
        TCM | {"nu": 1e6, "loc": 0.4, "scale": 1.2},
        TCM | {"loc": 3.0, "scale": 0.001},
        TCM | {"nu": 1.0, "loc": -20.0},
    ],
)
def test_quantiles_of_the_truncated_student_t_equal_those_of_scipy(law):
    t = pytest.importorskip("scipy.stats").t(law["nu"], loc=law["loc"], scale=law["scale"])
    uniform = torch.linspace(1e-4, 1 - 1e-4, 1001, dtype=torch.float64)
    sigma = truncated_student_t_sigmas(uniform, **law)
    # Back through the survival function, which keeps its digits above the centre of the law.
    low, high = (t.sf(math.log(law[end])) for end in ("low", "high"))
    assert (low - t.sf(sigma.log().numpy())) / (low - high) == pytest.approx(
        uniform.numpy(), abs=1e-6
    )
    exact = torch.from_numpy(t.isf((low - uniform * (low - high)).numpy())).exp()
    torch.testing.assert_close(sigma, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), [(1.0, 80.0), (0.002, 80.0), (1.5, 33.3), (0.2, 0.7)])
def test_quantiles_run_from_end_to_end_of_the_interval_and_never_leave_it(dtype, low, high):
    uniform = torch.linspace(0, 1, 10_001, dtype=dtype)  # torch.rand can be exactly 0
    sigma = truncated_student_t_sigmas(uniform, **TCM | {"low": low, "high": high})
    assert sigma.dtype == dtype
    ends = torch.tensor([low, high], dtype=dtype)
    torch.testing.assert_close(sigma[[0, -1]], ends, rtol=1e-6, atol=0)
    assert bool((sigma >= ends[0]).all())
    assert bool((sigma <= ends[1]).all())
    assert bool((sigma.diff() >= 0).all())


@pytest.mark.parametrize(
    ("loc", "scale", "median"),
    [
        (0.0, 0.01, 0.006745),  # half a normal law; 80 is 438 widths out
        (3.0, 0.01, 3.0),  # 1 is 300 widths out, and 80 is 138
        (-20.0, 0.2, 1.01 * math.log(2) * 0.2**2 / 20),  # the tail alone: an exponential law
    ],
)
def test_quantiles_of_a_nearly_normal_law_in_a_far_wider_interval_stay_finite(loc, scale, median):
    law = TCM | {"nu": 1e6, "loc": loc, "scale": scale}
    sigma = truncated_student_t_sigmas(torch.linspace(0, 1, 1001, dtype=torch.float64), **law)
    assert torch.isfinite(sigma).all()
    assert sigma[500].log().item() == pytest.approx(median, rel=5e-3)


def test_student_t_sigmas_keep_the_shape_of_the_uniforms():
    assert truncated_student_t_sigmas(torch.rand(2, 3), **TCM).shape == (2, 3)


@pytest.mark.parametrize(
    "wrong", [{"nu": 0}, {"scale": 0}, {"low": 0}, {"low": 90}, {"high": math.inf}]
)
def test_impossible_student_t_laws_are_refused(wrong):
    with pytest.raises(ValueError, match="need nu"):
        truncated_student_t_sigmas(torch.rand(2), **TCM | wrong)


# ---- TrigFlow ------------------------------------------------------------------------------


def test_angles_match_the_oracles():
    t = torch.tensor([1.1], dtype=torch.float64)
    assert angle_to_sigma(t, 0.5).item() == pytest.approx(0.98238, abs=5e-6)
    sigma = torch.tensor([80.0], dtype=torch.float64)
    assert sigma_to_angle(sigma, 0.5).item() == pytest.approx(1.564546, abs=5e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_angle_and_sigma_are_inverse_over_the_whole_range(dtype, rtol):
    sigma = karras_sigmas(200, EPS, T).to(dtype)
    angle = sigma_to_angle(sigma, 0.5)
    assert angle.dtype == dtype
    assert bool((angle.diff() > 0).all())
    torch.testing.assert_close(angle_to_sigma(angle, 0.5), sigma, rtol=rtol, atol=0)


def test_at_an_angle_of_45_degrees_noise_and_data_are_equally_strong():
    sigma = torch.tensor([0.3], dtype=torch.float64)
    assert sigma_to_angle(sigma, 0.3).item() == pytest.approx(math.pi / 4)
