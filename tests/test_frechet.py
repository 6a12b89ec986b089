import io
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency.evaluation.frechet import (
    Gaussian,
    GaussianStats,
    frechet_distance,
    relative_frechet_percent,
)


def features(n, dim, seed=0, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) / np.sqrt(dim)
    return scale * rng.standard_normal((n, dim)) @ mixing + shift


def stats(*args, **kwargs):
    return GaussianStats.from_features(features(*args, **kwargs))


def gaussian(mean, covariance, n=10_000):
    return GaussianStats(n, np.asarray(mean, float), np.asarray(covariance, float) * (n - 1))


def distance_from_features(x, y):
    """Oracle: root trace from the features' QR factors; no covariance is ever squared."""
    roots = []
    for values in (x, y):
        centred = values - values.mean(0)
        roots.append(np.linalg.qr(centred, mode="r").T / np.sqrt(len(values) - 1))
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    delta = x.mean(0) - y.mean(0)
    return delta @ delta + sum((root**2).sum() for root in roots) - 2 * cross


def test_one_dimensional_gaussians_are_closed_form():
    a, b = gaussian([1.0], [[4.0]]), gaussian([-2.0], [[0.25]])
    assert frechet_distance(a, b) == pytest.approx(9 + (2 - 0.5) ** 2, abs=1e-12)


def test_commuting_covariances_are_closed_form():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    first, second = rng.uniform(0, 3, 12), rng.uniform(0, 3, 12)
    mean = rng.standard_normal(12)
    a = gaussian(mean, basis * first @ basis.T)
    b = gaussian(np.zeros(12), basis * second @ basis.T)
    exact = mean @ mean + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(exact, abs=1e-10)


def grey(n, seed):
    """Like a network's float32 features of grey images: none negative, some of them always 0."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, 96)) * np.geomspace(1, 1e-8, 96)
    mixing = np.random.default_rng(0).standard_normal((96, 96))
    return np.maximum(latent @ mixing - 3, 0).astype(np.float32).astype(np.float64)


def nearly_singular(n, seed):
    """Standard deviations down to a millionth, in directions of no single feature."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))
    return features(n, 64, seed) * np.geomspace(1, 1e-6, 64) @ rotation


def with_column(x, value):
    x = x.copy()
    x[:, 3] = value
    return x


PAIRS = {
    "more samples": (features(500, 64, 1), features(900, 64, 2, scale=1.5, shift=0.3)),
    "both fewer": (features(30, 64, 1), features(30, 64, 2, scale=1.5, shift=0.3)),
    "one fewer": (features(30, 64, 1), features(500, 64, 2, scale=1.5, shift=0.3)),
    "as many": (features(64, 64, 1), features(65, 64, 2, scale=1.5, shift=0.3)),
    "two": (features(2, 8, 1), features(2, 8, 2)),
    "dead in both": (with_column(features(200, 16, 1), 0), with_column(features(200, 16, 2), 0)),
    "dead in one": (with_column(features(200, 16, 1), 0), features(200, 16, 2)),
    "constant in one": (with_column(features(200, 16, 1), 3.14159), features(200, 16, 2)),
    "grey": (grey(2_000, 1), grey(2_000, 2)),
    "grey and not": (grey(2_000, 1), features(2_000, 96, 2)),
    "graded": (features(400, 48, 1), features(400, 48, 2) * np.geomspace(1, 1e-9, 48)),
    "far from zero": (features(300, 32, 1, shift=1e4), features(300, 32, 2, shift=1e4)),
    "itself": (features(1_000, 64, 1), features(1_000, 64, 1)),
    "itself, fewer": (features(10, 64, 1), features(10, 64, 1)),
    "itself, grey": (grey(2_000, 1), grey(2_000, 1)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_distance_is_exact_to_1e_12_of_the_trace(case):
    x, y = PAIRS[case]
    a, b = GaussianStats.from_features(x), GaussianStats.from_features(y)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(max(distance_from_features(x, y), 0), abs=1e-12 * trace)
    assert distance >= 0


@pytest.mark.parametrize("other", [nearly_singular(500, 2), features(500, 64, 2)])
def test_a_nearly_singular_covariance_leaves_1e_10_of_the_trace(other):
    x = nearly_singular(500, 1)
    a, b = GaussianStats.from_features(x), GaussianStats.from_features(other)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    oracle = distance_from_features(x, other)
    assert frechet_distance(a, b) == pytest.approx(oracle, abs=1e-10 * trace)


def test_a_dependent_feature_in_one_set_only_costs_the_root_of_rounding():
    x, y = features(300, 12, 1), features(300, 12, 2)
    x[:, 5] = x[:, :3] @ [1.0, -2.0, 0.5]  # its covariance is singular, which n does not tell
    a, b = GaussianStats.from_features(x), GaussianStats.from_features(y)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    oracle = distance_from_features(x, y)
    assert frechet_distance(a, b) == pytest.approx(oracle, abs=1e-7 * trace)


def test_dead_features_do_not_cost_an_eigendecomposition(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    for x in PAIRS["dead in both"]:
        assert GaussianStats.from_features(x).gaussian.root[3].abs().max() == 0


def test_rotating_both_sets_leaves_their_distance():
    x, y = PAIRS["one fewer"]
    rotation, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((64, 64)))
    plain, rotated = (
        frechet_distance(GaussianStats.from_features(p), GaussianStats.from_features(q))
        for p, q in ((x, y), (x @ rotation, y @ rotation))
    )
    assert rotated == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("n", [40, 500])
def test_statistics_without_a_count_are_whole_rank(n):
    a, b = GaussianStats.from_features(features(n, 64, 1)), stats(500, 64, 2)
    unknown = Gaussian(a.mean, a.covariance, None)
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    # Noise in the missing directions counts: nothing says that they are missing.
    exact = frechet_distance(a, b)
    assert frechet_distance(unknown, b) == pytest.approx(exact, abs=1e-5 * trace)
    assert unknown.root.shape == (64, 64)
    assert a.gaussian.root.shape == (64, min(64, n - 1))


def test_the_root_of_a_reference_is_computed_once(monkeypatch):
    a, b, reference = stats(100, 8, 1), stats(5, 8, 2), stats(6, 8, 3)
    assert frechet_distance(a, reference) == frechet_distance(a.gaussian, reference.gaussian)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    frechet_distance(a, reference)
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda s: calls.append(s) or eigh(s))
    frechet_distance(b, reference)
    frechet_distance(b, reference)
    assert len(calls) == 1


def test_distance_is_symmetric_and_positive():
    a, b = stats(100, 32, 1), stats(40, 32, 2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) > 0


def test_shifting_a_set_moves_it_by_the_squared_shift():
    shift = np.random.default_rng(5).standard_normal(32)
    x = features(300, 32)
    a, b = GaussianStats.from_features(x), GaussianStats.from_features(x + shift)
    assert frechet_distance(a, b) == pytest.approx(shift @ shift, abs=1e-9)


def test_scaling_both_sets_scales_the_distance_and_not_the_percentage():
    x, y = features(100, 8, 1), features(100, 8, 2)
    small = GaussianStats.from_features(x), GaussianStats.from_features(y)
    large = GaussianStats.from_features(10 * x), GaussianStats.from_features(10 * y)
    assert frechet_distance(*large) == pytest.approx(100 * frechet_distance(*small))
    assert relative_frechet_percent(*large) == pytest.approx(relative_frechet_percent(*small))


def test_percentage_is_of_the_references_variance():
    a, reference = gaussian([3.0], [[1.0]]), gaussian([0.0], [[4.0]])
    assert relative_frechet_percent(a, reference) == pytest.approx(100 * (9 + 1) / 4)
    with pytest.raises(ValueError, match="constant"):
        relative_frechet_percent(a, gaussian([0.0], [[0.0]]))


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    order=st.randoms(use_true_random=False),
    offset=st.sampled_from([0.0, 1000.0]),
)
def test_merging_any_partition_in_any_order_gives_the_same_statistics(cuts, order, offset):
    x = features(60, 7, shift=offset)
    parts = [part for part in np.split(x, sorted(cuts)) if len(part)]
    order.shuffle(parts)
    merged = GaussianStats.from_features(parts[0])
    for part in parts[1:]:
        merged = merged.merge(GaussianStats.from_features(part))
    whole = GaussianStats.from_features(x)
    assert merged.n == whole.n == 60
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9, atol=1e-9 * np.trace(whole.m2))


def test_merged_shards_give_the_distance_of_the_whole():
    x, reference = features(400, 24, 1), stats(400, 24, 2)
    merged = GaussianStats.from_features(x[:1])
    for shard in (x[1:7], x[7:300], x[300:]):
        merged = merged.merge(GaussianStats.from_features(shard))
    whole = frechet_distance(GaussianStats.from_features(x), reference)
    assert frechet_distance(merged, reference) == pytest.approx(whole, rel=1e-9)


def test_covariance_is_the_unbiased_one():
    x = features(50, 5)
    np.testing.assert_allclose(
        GaussianStats.from_features(x).covariance, np.cov(x.T), rtol=1e-12, atol=1e-14
    )


def test_statistics_take_one_float64_copy_of_the_features_and_leave_them_alone():
    x = features(50_000, 8).astype(np.float32)
    before = x.copy()
    tracemalloc.start()
    GaussianStats.from_features(x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * x.size * 8
    for kept in (x, torch.from_numpy(x), x.astype(np.float64), torch.from_numpy(x).double()):
        GaussianStats.from_features(kept)
        np.testing.assert_array_equal(np.asarray(kept), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_features_are_accumulated_in_float64(dtype):
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).add(50).to(dtype)
    from_torch = GaussianStats.from_features(x)
    from_numpy = GaussianStats.from_features(x.double().numpy())
    np.testing.assert_array_equal(from_torch.m2, from_numpy.m2)
    assert from_torch.mean.dtype == np.float64


def test_statistics_survive_an_npz_file():
    a = stats(20, 6)
    file = io.BytesIO()
    np.savez(file, **a.to_dict())
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        b = GaussianStats.from_dict(arrays)
    assert b.n == 20
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(a.m2, b.m2)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.zeros(5), r"\[N, D\]"),
        (np.zeros((2, 3, 4)), r"\[N, D\]"),
        (np.zeros((0, 4)), r"\[N, D\]"),
        (np.array([[1.0, np.nan]]), "finite"),
        (np.array([[1.0, np.inf], [0.0, 0.0]]), "finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_features_that_are_not_a_finite_matrix_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        GaussianStats.from_features(bad)


def test_different_feature_dimensions_are_refused():
    with pytest.raises(ValueError, match="dimensions differ"):
        frechet_distance(stats(10, 4), stats(10, 5))
    with pytest.raises(ValueError, match="dimensions differ"):
        stats(10, 4).merge(stats(10, 5))


def test_a_single_sample_has_no_distance():
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(stats(1, 4), stats(10, 4))
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian(np.zeros(4), np.eye(4), 1)


def test_broken_statistics_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        GaussianStats(0, np.zeros(2), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"m2 \[D, D\]"):
        GaussianStats(5, np.zeros(2), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="float64"):
        GaussianStats(5, np.zeros(2, np.float32), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"covariance \[D, D\]"):
        Gaussian(np.zeros((1, 2)), np.zeros((2, 2)), 5)
    with pytest.raises(ValueError, match="finite"):
        Gaussian(np.zeros(2), np.full((2, 2), np.nan), None)
