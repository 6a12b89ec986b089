"""N(k), mu(k) and the gap over a schedule, as plots show them: against the papers' figures."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from consistency.config import NoiseConfig, TeacherConfig
from consistency.method_config import (
    ConsistencyConfig,
    ConstantLevels,
    DoublingLevels,
    LevelsConfig,
    LognormalPairs,
    RatioPairs,
    StopGradTarget,
    TargetEMA,
    UniformPairs,
)
from consistency.objectives.base import Progress
from consistency.objectives.pairs import num_levels
from pipelines.config import RecipeSource
from pipelines.curricula import POINTS, schedule_of
from pipelines.sweep_summary import Schedule

NOISE = NoiseConfig()
RECIPE = """\
name: tiny
teacher: {images: 1_000, batch: 100}
distill: {method: scd, images: 1_000, batch: 100}
isolate: {method: METHOD, images: IMAGES, batch: BATCH}
register: {model: tiny}
"""
FRACTIONS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
# Song et al. 2023, Appendix C, by hand: N(k) and mu(k) at these fractions.
CIFAR = (
    (2, 16, 34, 48, 76, 107, 131, 151),
    (*(0.9000, 0.9869, 0.9938, 0.9956, 0.9972, 0.9980, 0.9984, 0.9986),),
)
IMAGENET = (
    (2, 21, 45, 64, 101, 143, 175, 201),
    (*(0.9500, 0.9951, 0.9977, 0.9984, 0.9990, 0.9993, 0.9994, 0.9995),),
)


def stage(method: str, steps: int = 800_000, batch: int = 512, *settings: str) -> Any:
    """A published method's isolation stage."""
    text = RECIPE.replace("METHOD", method).replace("IMAGES", str(steps * batch))
    return RecipeSource("tiny.yaml", text.replace("BATCH", str(batch))).recipe(settings).isolate


def levels(config: LevelsConfig, steps: int = 800_000) -> ConsistencyConfig:
    made: ConsistencyConfig = stage("ict", steps)
    return replace(made, pairs=LognormalPairs(levels=config))


def ratio(steps: int = 8_000, **fields: Any) -> Schedule:
    made: ConsistencyConfig = stage("ect", steps)
    return schedule_of(1, replace(made, pairs=RatioPairs(**fields)), NOISE)


def at(values: Sequence[Any] | None, fractions: Sequence[float] = FRACTIONS) -> tuple[Any, ...]:
    assert values is not None
    return tuple(values[round(fraction * POINTS)] for fraction in fractions)


# --- grids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), CIFAR),
        (("isolate.pairs.levels.s1=200", "isolate.target.mu=0.95"), IMAGENET),
    ],
    ids=["CIFAR-10", "ImageNet-64"],
)
def test_consistency_training_has_the_papers_tables(
    settings: tuple[str, ...], expected: tuple[tuple[int, ...], tuple[float, ...]]
) -> None:
    found = schedule_of(3, stage("ct-2023", 800_000, 512, *settings), NOISE)
    assert (found.trial, len(found.fractions)) == (3, POINTS + 1)
    assert at(found.fractions) == FRACTIONS
    assert at(found.N) == expected[0]
    assert at(found.mu) == pytest.approx(expected[1], abs=5e-5)


def test_the_released_codes_mu_differs_at_the_beginning_alone() -> None:
    found = schedule_of(0, stage("ct-2023", 800_000, 512, "isolate.target.variant=openai"), NOISE)
    mu = at(found.mu)
    assert mu[0] == pytest.approx(0.81)
    assert mu[1:] == pytest.approx(CIFAR[1][1:], abs=1e-3)


def test_ict_doubles_its_levels_in_eight_equal_stages() -> None:
    found = schedule_of(0, stage("ict", 400_000, 1024), NOISE)
    stages = (11, 21, 41, 81, 161, 321, 641, 1281)
    expected = tuple(stages[min(8 * n // POINTS, 7)] for n in range(POINTS + 1))
    assert (found.N, found.mu) == (expected, None)  # the target is the student itself


def test_fewer_doublings_make_longer_stages() -> None:
    found = schedule_of(0, levels(DoublingLevels(s0=10, s1=80)), NOISE)
    expected = tuple((11, 21, 41, 81)[min(4 * n // POINTS, 3)] for n in range(POINTS + 1))
    assert (found.N, found.mu) == (expected, None)


def test_a_constant_grid_and_a_fixed_mu_stay() -> None:
    settings = (
        "isolate.pairs.levels={kind: constant, N: 120}",
        "isolate.target={kind: ema, mu: 0.99, adaptive_s0: 0}",
    )
    found = schedule_of(0, stage("ct-2023", 1_000, 512, *settings), NOISE)
    assert found.N == (120,) * (POINTS + 1)
    assert found.mu == (0.99,) * (POINTS + 1)
    assert found.gap is not None
    assert len(set(found.gap)) == 1


def test_the_shape_is_a_function_of_the_fraction_and_not_of_the_length_or_the_batch() -> None:
    for method in ("ct-2023", "ict", "ect"):
        whole = schedule_of(0, stage(method), NOISE)
        for steps, batch in [(400_000, 512), (1_600, 64), (800_000, 8)]:
            found = schedule_of(0, stage(method, steps, batch), NOISE)
            inner = slice(1 if method == "ct-2023" else 0, -1)
            assert (found.N or ())[inner] == (whole.N or ())[inner], method
            assert found.gap == pytest.approx(whole.gap), method


def test_the_last_point_is_the_last_step_and_no_step_beyond() -> None:
    """A schedule of two steps has two values, whatever the number of points."""
    found = schedule_of(0, stage("ct-2023", 2, 10), NOISE)
    assert found.N is not None
    assert set(found.N) == {2, 107}  # k/K = 0 and 1/2: the third, 151, is never trained
    assert found.N[-1] == 107


# --- gaps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "gap", "close"), [(18, 0.46, 5e-3), (151, 0.066, 5e-4), (1281, 0.0080, 1e-4)]
)
def test_the_gap_of_a_grid_is_that_of_its_interval_around_one(
    N: int, gap: float, close: float
) -> None:
    found = schedule_of(0, levels(ConstantLevels(N=N)), NOISE)
    assert at(found.gap) == pytest.approx((gap,) * 8, abs=close)
    uniform = replace(stage("ct-2023"), pairs=UniformPairs(levels=ConstantLevels(N=N)))
    assert schedule_of(0, uniform, NOISE).gap == found.gap  # of the grid, not of who draws


def test_the_gap_of_18_levels_is_that_of_edms_table() -> None:
    found = schedule_of(0, levels(ConstantLevels(N=18)), NOISE)
    assert at(found.gap, (0.5,)) == pytest.approx((1 - 0.58535 / 1.0882,), abs=1e-4)


def test_a_grid_that_does_not_reach_one_shows_its_nearest_interval() -> None:
    three, even = levels(ConstantLevels(N=3)), replace(NOISE, rho=1.0)
    low = schedule_of(0, three, replace(even, sigma_max=0.5))
    assert at(low.gap, (0.0,)) == pytest.approx((1 - 0.251 / 0.5,))
    high = schedule_of(0, three, replace(even, sigma_min=2.0, sigma_max=4.0))
    assert at(high.gap, (0.0,)) == pytest.approx((1 - 2 / 3,))


def test_the_gap_closes_as_the_grid_grows() -> None:
    for method in ("ct-2023", "ict"):
        found = schedule_of(0, stage(method), NOISE)
        assert found.N is not None
        assert found.gap is not None
        assert list(found.N) == sorted(found.N)
        by_level = dict(zip(found.N, found.gap, strict=True))
        far = {N: gap for N, gap in by_level.items() if N > 100}
        assert len(far) >= 4
        # 7 (T^(1/7) - eps^(1/7)) / (N - 1) for large N, to the first order in 1 / N
        assert [(N - 1) * gap for N, gap in far.items()] == pytest.approx(
            [10.2] * len(far), rel=0.06
        )


# --- ratios --------------------------------------------------------------------------------------


def test_ect_in_one_stage_has_one_small_gap() -> None:
    found = ratio(q=256.0, stages=1, k=8.0, b=1.0)
    assert found.gap == pytest.approx((0.0123,) * (POINTS + 1), abs=5e-5)
    assert found.N is None
    assert found.mu is None
    assert schedule_of(1, stage("ect-1hour", 8_000), NOISE) == found


def test_ect_closes_its_gap_in_eight_equal_stages() -> None:
    """1 - r/t at t = 1: (1 + 8 sigmoid(-1)) / 2^(m + 1) = 3.1515 / 2^(m + 1), or 1 at first."""
    found = ratio(q=2.0, stages=8, k=8.0, b=1.0)
    assert found == schedule_of(1, stage("ect", 8_000), NOISE)
    by_stage = [min(1.0, 3.15153 / 2 ** (m + 1)) for m in range(8)]
    expected = [by_stage[min(8 * n // POINTS, 7)] for n in range(POINTS + 1)]
    assert found.gap == pytest.approx(expected, abs=1e-5)
    # r/t of the ratio table: stage 0 -> 0, stage 2 -> 0.606, stage 7 -> 0.9877
    assert at(found.gap, (0.1, 0.3, 0.9)) == pytest.approx((1, 0.394, 0.0123), abs=5e-4)


def test_a_cap_on_the_ratio_keeps_the_gap_open() -> None:
    capped = ratio(q=4.0, stages=4, k=8.0, b=1.0, max_ratio=1 - 1 / 128)
    free = ratio(q=4.0, stages=4, k=8.0, b=1.0)
    assert at(capped.gap, (0.0, 0.5)) == at(free.gap, (0.0, 0.5))
    assert at(capped.gap, (1.0,)) == pytest.approx((3.15153 / 128,), abs=1e-5)
    assert at(free.gap, (1.0,)) == pytest.approx((3.15153 / 256,), abs=1e-5)


def test_a_target_network_beside_ratio_pairs_has_a_mu_and_no_levels() -> None:
    made = replace(stage("ect", 8_000), target=TargetEMA(mu=0.95))
    found = schedule_of(0, made, NOISE)
    assert (found.N, found.mu) == (None, (0.95,) * (POINTS + 1))
    assert schedule_of(0, replace(made, target=StopGradTarget()), NOISE).mu is None


# --- none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sct", "mean-flow"])
def test_continuous_time_has_fractions_alone(method: str) -> None:
    found = schedule_of(7, stage(method, 100, 10), NOISE)
    assert found.fractions == tuple(n / POINTS for n in range(POINTS + 1))
    assert (found.trial, found.N, found.mu, found.gap) == (7, None, None, None)


def test_a_diffusion_model_has_no_curriculum() -> None:
    found = schedule_of(0, TeacherConfig(images=1_000, batch=100), NOISE)
    assert (found.N, found.mu, found.gap) == (None, None, None)


@pytest.mark.parametrize(
    ("images", "batch"), [(28_800, 64), (16_000, 64), (1_500, 100), (1_000, 300)]
)
def test_the_curriculum_drawn_is_the_one_that_is_trained(images: int, batch: int) -> None:
    """The loop counts images, and neither they nor doublings divide into batches."""
    config = stage("ict", 10, batch, f"isolate.images={images}")
    found, K = schedule_of(0, config, NOISE), config.steps
    seen = [min(round(fraction * K), K - 1) * batch for fraction in found.fractions]
    trained = [num_levels(config.pairs.levels, Progress(at, images)) for at in seen]
    assert tuple(trained) == found.N


def test_the_settings_that_the_preset_of_2023_recommends_are_the_papers() -> None:
    recommended = (
        "isolate.init=teacher",
        "isolate.pairs.levels={kind: constant, N: 120}",
        "isolate.target={kind: ema, mu: 0.99, adaptive_s0: 0}",
    )
    found = schedule_of(0, stage("ct-2023", 1_000, 100, *recommended), NOISE)
    assert set(found.N or ()) == {120}
    assert set(found.mu or ()) == {0.99}
