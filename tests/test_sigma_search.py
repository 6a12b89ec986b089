"""The greedy search against curves whose minimum is known, and against Gaussian data."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency.sampling import sample_multistep, sample_noise
from consistency.schedules import karras_sigmas
from consistency.sigma_search import Outcome, Sigmas, next_level, search

LOWEST, HIGHEST = 0.002, 80.0
ASKED = {"grid": 8, "tolerance": 0.2, "evaluations": 24}


class Curve:
    """Counts what is asked of a function of the last level."""

    def __init__(self, of: Callable[[float], float]) -> None:
        self.of = of
        self.asked: list[Sigmas] = []

    def __call__(self, lists: Sequence[Sigmas]) -> list[float]:
        self.asked += lists
        return [self.of(math.log(one[-1])) for one in lists]


def found(curve: Curve, chosen: Sigmas = (HIGHEST,), **changes: object) -> float:
    asked: dict[str, object] = {"lowest": LOWEST, "known": {}, **ASKED, **changes}
    *before, sigma = next_level(curve, chosen, **asked)[0]
    assert tuple(before) == chosen
    return sigma


def most(low: float, high: float, grid: int, tolerance: float) -> int:
    """Evaluations: the grid, then the two cells of a valley, shrunk by the golden ratio."""
    width = 2 * math.log(high / low) / (grid + 1)
    return grid + 2 + max(0, math.ceil(math.log(width / tolerance) / math.log((1 + 5**0.5) / 2)))


# --- one level -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    centre=st.floats(math.log(LOWEST) - 2, math.log(HIGHEST) + 2),
    tolerance=st.sampled_from([0.02, 0.1, 0.2, 1.0]),
    grid=st.integers(3, 12),
)
def test_the_minimum_of_a_parabola_is_found_within_the_tolerance(centre, tolerance, grid):
    """Wherever it lies; beyond the ends the nearest end is."""
    curve = Curve(lambda x: (x - centre) ** 2)
    sigma = found(curve, tolerance=tolerance, grid=grid, evaluations=60)
    inside = min(max(centre, math.log(LOWEST)), math.log(HIGHEST))
    assert abs(math.log(sigma) - inside) <= tolerance
    assert LOWEST < sigma < HIGHEST
    assert len(curve.asked) <= most(LOWEST, HIGHEST, grid, tolerance)
    assert len(set(curve.asked)) == len(curve.asked)


@pytest.mark.parametrize(("deep", "shallow"), [(0.3, 6.0), (6.0, 0.3), (0.01, 10.0)])
def test_of_two_valleys_the_deeper_one_is_found(deep, shallow):
    def two(x: float) -> float:
        near = [math.exp(-((x - math.log(c)) ** 2)) for c in (deep, shallow)]
        return 3 - 1.2 * near[0] - near[1]

    x = np.linspace(math.log(LOWEST), math.log(HIGHEST), 20_001)
    truth = x[np.argmin([two(float(v)) for v in x])]
    assert abs(math.log(found(Curve(two))) - truth) <= 0.2


def test_a_valley_with_plateaus_on_both_sides_is_found():
    """What two steps look like: near both ends the second step changes nothing."""

    def dip(x: float) -> float:
        return 1 - 0.3 * math.exp(-((x - math.log(0.9)) ** 2))

    assert abs(math.log(found(Curve(dip)) / 0.9)) <= 0.2


@pytest.mark.parametrize("seed", range(5))
def test_noise_costs_no_more_than_its_own_size(seed):
    """A rough but fixed curve, as of common random numbers."""
    rough = np.random.default_rng(seed).normal(0, 0.02, 4_000)

    def noisy(x: float) -> float:
        return min(1.0, 0.2 * (x - math.log(0.9)) ** 2) + float(rough[int(100 * (x + 10))])

    curve = Curve(noisy)
    sigma = found(curve)
    assert abs(math.log(sigma / 0.9)) <= 1.0
    assert noisy(math.log(sigma)) == min(noisy(math.log(one[-1])) for one in curve.asked)
    assert len(curve.asked) <= 24  # two valleys


def test_on_a_flat_curve_the_highest_level_of_the_grid_stays():
    curve = Curve(lambda x: 1.0)
    assert found(curve) == max(one[-1] for one in curve.asked[:8])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_bad(bad):
    def broken(x: float) -> float:
        return bad if x > 0 else (x + 2) ** 2

    assert abs(math.log(found(Curve(broken))) + 2) <= 0.2
    assert LOWEST < found(Curve(lambda x: bad)) < HIGHEST  # nothing to choose by, but an answer


def test_the_number_of_evaluations_is_bounded():
    for bound in (9, 12, 24):
        curve = Curve(lambda x: (x - 0.7) ** 2)
        found(curve, evaluations=bound, tolerance=0.001)
        assert len(curve.asked) == bound


def test_the_grid_is_asked_for_at_once():
    sizes = []

    def objective(lists: Sequence[Sigmas]) -> list[float]:
        sizes.append(len(lists))
        return [math.log(one[-1]) ** 2 for one in lists]

    next_level(objective, (HIGHEST,), lowest=LOWEST, known={}, also=(0.821,), **ASKED)
    assert sizes[0] == 9
    assert set(sizes[1:]) == {1}


def test_what_is_known_is_not_measured_again():
    known: dict[Sigmas, float] = {}
    first, second = (Curve(lambda x: (x + 0.5) ** 2) for _ in range(2))
    assert found(first, known=known) == found(second, known=known)
    assert len(first.asked) == len(known)
    assert second.asked == []


def test_a_level_of_ones_own_may_win_and_its_surroundings_are_searched():
    def needle(x: float) -> float:  # between two levels of the grid, and narrower
        return 1 - math.exp(-(((x - math.log(3.3)) / 0.1) ** 2)) + 0.01 * abs(x)

    assert found(Curve(needle), also=(3.0,)) == pytest.approx(3.3, rel=0.1)
    assert found(Curve(needle)) != pytest.approx(3.3, rel=0.1)


# --- several levels ------------------------------------------------------------------------------


def karras(steps: int) -> Sigmas:
    if steps == 2:
        return (HIGHEST, 0.821)
    grid = karras_sigmas(steps + 1, LOWEST, HIGHEST, 7.0).flip(0)[:-1]
    return (HIGHEST, *(float(s) for s in grid[1:]))


def wanting(*levels: float) -> Callable[[Sequence[Sigmas]], list[float]]:
    """A sampler that is best at these levels, and the better for each of them."""

    def value(one: Sigmas) -> float:
        apart = sum((math.log(a / b)) ** 2 for a, b in zip(one[1:], levels, strict=False))
        return apart - 0.1 * len(one)

    return lambda lists: [value(one) for one in lists]


def greedy(objective, confirm=None, **changes):
    asked = {"lowest": LOWEST, "steps": 4, **ASKED, **changes}
    return search(objective, confirm or objective, karras, **asked)


def test_levels_are_found_one_below_the_other_and_shorter_lists_are_prefixes():
    outcomes = greedy(wanting(5.0, 0.5, 0.05))
    assert [one.steps for one in outcomes] == [2, 3, 4]
    for shorter, longer in pairwise(outcomes):
        assert longer.kept[:-1] == shorter.kept
    assert outcomes[-1].kept[1:] == pytest.approx([5.0, 0.5, 0.05], rel=0.2)
    for one in outcomes:
        assert one.kept != one.default
        assert list(one.confirmed)[:2] == [one.default, one.found]
        assert 2 <= len(one.confirmed) <= 3


def test_a_level_below_the_last_is_sought_even_where_the_best_lies_above():
    outcomes = greedy(wanting(0.5, 5.0))
    assert all(a > b for one in outcomes for a, b in zip(one.kept, one.kept[1:], strict=False))


def test_what_the_larger_sample_does_not_confirm_is_not_kept():
    """The confirmation prefers what the search did not."""
    outcomes = greedy(wanting(5.0, 0.5, 0.05), confirm=wanting(0.821, 0.1, 0.01), steps=2)
    (one,) = outcomes
    assert one.found[1] == pytest.approx(5.0, rel=0.2)
    assert one.kept == one.default == (HIGHEST, 0.821)


def test_of_equals_the_default_stays():
    (one,) = greedy(wanting(5.0), confirm=lambda lists: [1.0] * len(lists), steps=2)
    assert one.kept == one.default


def test_the_other_valley_may_win_on_the_larger_sample():
    """Both were searched to their floors, so neither is at a disadvantage."""

    def two(lists: Sequence[Sigmas], better: float) -> list[float]:
        depth = {6.0: 1.0, 0.3: 1.0} | {better: 1.1}
        x = [math.log(one[-1]) for one in lists]
        return [-sum(d * math.exp(-((v - math.log(c)) ** 2)) for c, d in depth.items()) for v in x]

    (one,) = greedy(lambda lists: two(lists, 6.0), confirm=lambda lists: two(lists, 0.3), steps=2)
    assert one.found[1] == pytest.approx(6.0, rel=0.2)
    assert one.kept[1] == pytest.approx(0.3, rel=0.2)
    assert one.kept not in (one.found, one.default)


def test_after_a_default_of_two_steps_the_third_level_lies_below_it():
    outcomes = greedy(wanting(5.0, 0.5), confirm=wanting(0.821, 0.3), steps=3)
    assert outcomes[0].kept == (HIGHEST, 0.821)
    assert outcomes[1].found[:2] == (HIGHEST, 0.821)


def test_no_finite_value_anywhere_keeps_the_default():
    outcomes = greedy(lambda lists: [math.nan] * len(lists))
    assert [one.kept for one in outcomes] == [one.default for one in outcomes]


def test_the_search_ends_where_no_room_is_left():
    outcomes = greedy(wanting(0.0021, 0.002, 0.002))
    assert len(outcomes) < 3
    assert all(one.kept[-1] > LOWEST for one in outcomes)


# --- Gaussian data: what a sampler with an imperfect f should do ---------------------------------

V, EPS = 0.25, 0.002  # variance of the data, the boundary
GRID = [float(s) for s in karras_sigmas(18, EPS, HIGHEST, 7.0)]  # ascending


def student(sigma: float) -> float:
    """f(x, sigma) / x of a student that learned Heun's steps on 18 levels perfectly.

    For data N(0, V) a Heun step multiplies x. Exact would be sqrt((V + eps^2) / (V + sigma^2)).
    """

    def slope(s: float) -> float:  # (x - D(x, s)) / s = slope(s) x, D = V x / (V + s^2)
        return s / (V + s**2)

    scale, at = 1.0, sigma
    for below in sorted((s for s in GRID if s < sigma), reverse=True):
        h = below - at
        euler = 1 + h * slope(at)
        scale *= 1 + h / 2 * (slope(at) + slope(below) * euler)
        at = below
    return scale


def spread(sigmas: Sigmas, scale: Callable[[float], float]) -> float:
    """Standard deviation of multistep samples, exactly."""
    variance = (scale(HIGHEST) * HIGHEST) ** 2
    for sigma in sigmas[1:]:
        variance = scale(sigma) ** 2 * (variance + sigma**2 - EPS**2)
    return math.sqrt(variance)


def frechet(lists: Sequence[Sigmas], scale: Callable[[float], float]) -> list[float]:
    return [(spread(one, scale) - math.sqrt(V + EPS**2)) ** 2 for one in lists]


def test_the_student_of_eighteen_levels_is_five_and_a_half_percent_too_large():
    assert spread((HIGHEST,), student) == pytest.approx(0.52763, abs=1e-4)  # as computed by others


def mildly_wrong(sigma: float) -> float:
    """f / x of a student that is the more too large the higher the level, without a grid."""
    exact = math.sqrt((V + EPS**2) / (V + sigma**2))
    return exact * (1 + 0.055 * sigma**2 / (1 + sigma**2))


@pytest.mark.parametrize("scale", [student, mildly_wrong])
def test_two_steps_of_an_imperfect_student_are_best_where_brute_force_says(scale):
    def measured(lists: Sequence[Sigmas]) -> list[float]:
        return frechet(lists, scale)

    def searched(steps: int) -> list[Outcome]:
        asked = {"grid": 8, "tolerance": 0.05, "evaluations": 24}
        return search(measured, measured, karras, lowest=EPS, steps=steps, **asked)

    x = np.exp(np.linspace(math.log(EPS), math.log(HIGHEST), 4_001)[1:-1])
    values = measured([(HIGHEST, float(sigma)) for sigma in x])
    (one,) = searched(2)
    assert one.kept != one.default
    assert measured([one.kept])[0] < measured([one.default])[0]
    assert measured([one.kept])[0] < 1.02 * min(values)
    if scale is mildly_wrong:  # the other's curve has a valley per level of its grid
        assert abs(math.log(one.kept[1] / x[int(np.argmin(values))])) <= 0.05
    errors = [measured([one.kept])[0] for one in searched(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_the_real_sampler_with_common_noise_leads_to_the_same_level():
    """4,000 samples of 16 numbers each stand for the distribution."""
    small = 0.1  # the sampler clamps to [-1, 1]: data a tenth as large, at levels a tenth as high

    def f(x: torch.Tensor, sigma: torch.Tensor, labels: object) -> torch.Tensor:
        return x * mildly_wrong(float(sigma[0]) / small)

    def draw(number: int) -> torch.Tensor:
        return sample_noise(7, range(4_000), (1, 4, 4), number).double()

    def measured(lists: Sequence[Sigmas]) -> list[float]:
        ends = {"sigma_min": small * EPS, "sigma_max": small * HIGHEST}
        found = [sample_multistep(f, draw, [small * s for s in one], **ends) for one in lists]
        return [(float(x.std()) / small - math.sqrt(V + EPS**2)) ** 2 for x in found]

    assert measured([(HIGHEST, 0.5)]) == measured([(HIGHEST, 0.5)])
    sampled = next_level(measured, (HIGHEST,), lowest=EPS, known={}, **ASKED)[0]
    exact = next_level(
        lambda one: frechet(one, mildly_wrong), (HIGHEST,), lowest=EPS, known={}, **ASKED
    )[0]
    assert abs(math.log(sampled[1] / exact[1])) <= 0.2
