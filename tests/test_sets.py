"""Metrics of whole sets against their definitions, loop by loop, on small sets."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from consistency.evaluation import sets
from consistency.evaluation.extractors import load_extractor
from consistency.evaluation.frechet import Gaussian, GaussianStats, frechet_distance
from consistency.evaluation.sets import (
    Manifold,
    fd_infinity,
    inception_score,
    kid,
    mean_norm,
    precision_recall_density_coverage,
    squared_mmd,
)

DATA = Path(os.environ.get("CMFORGE_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))


def normal(n, dim=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, dim)) + shift


def mmd_by_loops(x, y):
    """Binkowski et al. 2018, Eq. 4: no sample is compared with itself."""
    kernel = lambda a, b: (float(a @ b) / x.shape[1] + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    real = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + real - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def manifold_by_loops(real, fake, k):
    def distance(a, b):
        return ((a - b) ** 2).sum()

    def radius(own, i):
        return sorted(distance(own[i], b) for j, b in enumerate(own) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, j) for j in range(len(fake))]
    near_real = np.array(
        [[distance(f, r) <= q for r, q in zip(real, real_radii, strict=True)] for f in fake]
    )
    near_fake = np.array(
        [[distance(f, r) <= q for f, q in zip(fake, fake_radii, strict=True)] for r in real]
    )
    return Manifold(
        precision=near_real.any(1).mean(),
        recall=near_fake.any(1).mean(),
        density=near_real.sum() / (k * len(fake)),
        coverage=near_real.any(0).mean(),
    )


def test_mmd_is_its_double_sum():
    x, y = normal(9, seed=1), normal(7, seed=2, shift=0.5)
    assert squared_mmd(x, y) == pytest.approx(mmd_by_loops(x, y), rel=1e-12)


def test_mmd_of_equal_distributions_is_zero_on_average_and_negative_at_times():
    values = [squared_mmd(normal(40, seed=2 * s), normal(40, seed=2 * s + 1)) for s in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10
    assert min(values) < 0 < max(values)


def test_kid_averages_to_the_mmd_of_the_whole():
    x, y = normal(300, seed=1), normal(200, seed=2, shift=0.3)
    mean, std = kid(x, y, subsets=400, subset_size=50)
    assert mean == pytest.approx(squared_mmd(x, y), abs=4 * std / 20)
    assert std > 0


def test_kid_subsets_are_capped_at_the_smaller_set(monkeypatch):
    x, y = normal(30, seed=1), normal(30, seed=2, shift=0.5)
    mean, std = kid(x, y, subsets=3)
    assert mean == pytest.approx(squared_mmd(x, y), rel=1e-9)
    assert std < 1e-12
    monkeypatch.setattr(sets, "_squared_mmd", lambda a, b, scale: 100 * len(a) + len(b))
    assert kid(x, y[:5], subsets=2, subset_size=10) == (505, 0)


def test_kid_depends_on_its_seed_alone():
    x, y = normal(100, seed=1), normal(100, seed=2)
    options = {"subsets": 5, "subset_size": 20}
    assert kid(x, y, seed=3, **options) == kid(x, y, seed=3, **options)
    assert kid(x, y, seed=3, **options) != kid(x, y, seed=4, **options)


def test_scale_divides_the_features():
    x, y = 80 * normal(50, seed=1), 80 * normal(50, seed=2, shift=0.5)
    scale = mean_norm(y)
    assert scale == pytest.approx(np.mean([np.sqrt((row**2).sum()) for row in y]))
    assert kid(x, y, subsets=2, scale=scale) == pytest.approx(
        kid(x / scale, y / scale, subsets=2), rel=1e-9
    )


def test_features_are_computed_in_float64():
    x, y = normal(60, seed=1).astype(np.float32), normal(60, seed=2).astype(np.float32)
    assert squared_mmd(x, y) == squared_mmd(x.astype(np.float64), y.astype(np.float64))


def test_inception_score_of_uniform_logits_is_one():
    assert inception_score(np.zeros((100, 7)) + 3.0) == pytest.approx((1.0, 0.0), abs=1e-12)


def test_inception_score_of_certain_balanced_classes_is_their_number():
    logits = 1e3 * np.eye(7)[np.arange(140) % 7]
    assert inception_score(logits) == pytest.approx((7.0, 0.0), abs=1e-9)


def test_inception_score_is_its_definition_split_by_split():
    logits = 2 * normal(60, 5)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(p, 3)]
    assert inception_score(logits, splits=3) == pytest.approx((np.mean(scores), np.std(scores)))
    whole, _ = inception_score(logits, splits=1)
    assert 1 < np.mean(scores) < 5
    assert whole != np.mean(scores)


coordinates = st.integers(-3, 3).map(float)


@settings(max_examples=60, deadline=None)
@given(
    real=st.integers(3, 9).flatmap(lambda n: arrays(np.float64, (n, 2), elements=coordinates)),
    fake=st.integers(3, 9).flatmap(lambda n: arrays(np.float64, (n, 2), elements=coordinates)),
    k=st.integers(1, 2),
)
def test_manifold_metrics_are_their_definitions_ties_included(real, fake, k):
    assert precision_recall_density_coverage(real, fake, k) == manifold_by_loops(real, fake, k)


def test_manifold_metrics_do_not_depend_on_the_chunks(monkeypatch):
    real, fake = normal(50, seed=1), normal(40, seed=2, shift=0.5)
    whole = precision_recall_density_coverage(real, fake)
    monkeypatch.setattr(sets, "CHUNK", 170)
    assert precision_recall_density_coverage(real, fake) == whole


def test_a_set_covers_itself():
    x = normal(100)
    metrics = precision_recall_density_coverage(x, x)
    assert (metrics.precision, metrics.recall, metrics.coverage) == (1, 1, 1)
    assert metrics.density >= 1


def test_sets_far_apart_share_nothing():
    metrics = precision_recall_density_coverage(normal(50), normal(60, shift=100))
    assert metrics == Manifold(precision=0, recall=0, density=0, coverage=0)


def test_swapping_the_sets_swaps_precision_and_recall():
    x, y = normal(80, seed=1), normal(70, seed=2, shift=0.7)
    there, back = precision_recall_density_coverage(x, y), precision_recall_density_coverage(y, x)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision != there.recall


def test_one_mode_of_two_is_precise_and_recalls_half():
    real = np.concatenate([normal(200, 2, seed=1), normal(200, 2, seed=2, shift=50)])
    metrics = precision_recall_density_coverage(real, normal(400, 2, seed=3))
    assert metrics.precision > 0.9
    assert 0.4 < metrics.recall <= 0.5
    assert 0.4 < metrics.coverage <= 0.5


@pytest.mark.parametrize(("shift", "limit"), [(0.0, 0.0), (0.5, 8 * 0.25)])
def test_fd_infinity_takes_off_the_bias_of_the_count(shift, limit):
    truth = Gaussian(np.zeros(8), np.eye(8), None)
    x = normal(2_000, 8, shift=shift)
    value, r2 = fd_infinity(x, truth)
    few = frechet_distance(GaussianStats.from_features(x[:400]), truth)
    # What remains is the chance of this one set: its mean is off by sqrt(D / n).
    assert value == pytest.approx(limit, abs=0.02 + 4 * 2 * shift * np.sqrt(8 / 2_000))
    assert few > 0.03 + limit / 2
    assert 0.8 < r2 <= 1 or shift


def test_fd_infinity_is_where_the_line_in_1_over_n_ends(monkeypatch):
    counts = []

    def line(stats, reference):
        counts.append(stats.n)
        return 10 + 500 / stats.n

    monkeypatch.setattr(sets, "frechet_distance", line)
    reference = GaussianStats.from_features(normal(20))
    assert fd_infinity(normal(1_000), reference) == pytest.approx((10, 1), rel=1e-9)
    assert counts == list(range(200, 1_001, 100))


def test_fd_infinity_depends_on_its_seed_alone():
    reference = GaussianStats.from_features(normal(500, 6, seed=9))
    x = normal(1_000, 6, seed=1, shift=0.2)
    assert fd_infinity(x, reference, seed=1) == fd_infinity(x, reference.gaussian, seed=1)
    assert fd_infinity(x, reference, seed=1) != fd_infinity(x, reference, seed=2)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: kid(normal(9, 4), normal(9, 5)), "one D"),
        (lambda: kid(normal(9)[0], normal(9)), r"\[N, D\]"),
        (lambda: kid(normal(0), normal(9)), r"\[N, D\]"),
        (lambda: squared_mmd(normal(9) * np.nan, normal(9)), "finite"),
        (lambda: squared_mmd(normal(1), normal(9)), "at least 2"),
        (lambda: precision_recall_density_coverage(normal(3), normal(9)), "more than 3"),
        (lambda: precision_recall_density_coverage(normal(9), normal(3)), "more than 3"),
        (lambda: inception_score(normal(9), splits=10), "10 splits"),
        (lambda: fd_infinity(normal(9), GaussianStats.from_features(normal(9))), "10 samples"),
        (lambda: fd_infinity(normal(20, 5), GaussianStats.from_features(normal(9))), "differ"),
    ],
)
def test_sets_that_allow_no_metric_are_refused(call, reason):
    with pytest.raises(ValueError, match=reason):
        call()


# --- real images ---------------------------------------------------------------------------------


def cifar(sheet):
    """1,000 of the training images, in order: uint8 [1000, 32, 32, 3]."""
    tiles = np.asarray(Image.open(DATA / f"cifar10/train_{sheet:02d}.webp").convert("RGB"))
    return tiles.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="real data (CMFORGE_TEST_DATA) absent")
def test_real_sets_measure_as_recorded_and_recall_sees_the_jpeg():
    extract = load_extractor("squeezenet11", DATA / "weights/squeezenet11_fp32.safetensors")
    images, others = (np.concatenate([cifar(s) for s in pair]) for pair in ((0, 1), (5, 6)))
    one, two = extract(images).pooled, extract(others).pooled
    lossy = extract(np.stack([jpeg(image) for image in images])).pooled

    same = precision_recall_density_coverage(two, one)
    measured = (same.precision, same.recall, same.density, same.coverage)
    assert measured == pytest.approx((0.696, 0.727, 0.921, 0.867), abs=3e-3)
    worse = precision_recall_density_coverage(two, lossy)
    assert worse.precision > same.precision - 0.04
    assert worse.recall < same.recall - 0.08
    assert worse.coverage < same.coverage - 0.06

    kept, std = kid(one, two, subsets=20)
    assert abs(kept) < std
    assert kid(lossy, two, subsets=20)[0] > 10 * std
