"""The Frechet distance's trace term against scipy's matrix square root, in turns.

python docs/bench_distance.py [--dim 2048] [--samples 10000] [--rounds 5] [--threads 2]

Needs scipy, which comes with scikit-learn. Three ways to Tr (S_1 S_2)^(1/2) from the same two
covariances: `sqrtm(S_1 @ S_2)`, the common one; ours with both roots fresh; ours with the
reference's root kept, as when many sets are held against one. Each round runs all three; the
ratios are within a round, their median is printed, of wall time and of CPU time (which a busy
machine disturbs less).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from consistency.evaluation.frechet import Gaussian, GaussianStats, frechet_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        compare(args.dim, args.samples, args.rounds)


def compare(dim: int, samples: int, rounds: int) -> None:
    a, b = (GaussianStats.from_features(features(samples, dim, seed)).gaussian for seed in (1, 2))
    ways: dict[str, Callable[[], float]] = {
        "sqrtm": lambda: by_sqrtm(a, b),
        "fresh": lambda: frechet_distance(fresh(a), fresh(b)),
        "cached": lambda: frechet_distance(fresh(a), b),
    }
    ways["cached"]()  # the reference's root, and every library's first call
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    values: dict[str, float] = {}
    for number in range(rounds):
        for way, distance in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            values[way] = distance()
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            seconds[way].append(spent)
            print(f"round {number}: {way} {spent[0]:.2f} s, CPU {spent[1]:.2f} s", flush=True)
    trace = float(np.trace(a.covariance) + np.trace(b.covariance))
    for way in ("fresh", "cached"):
        pairs = list(zip(seconds["sqrtm"], seconds[way], strict=True))
        wall, cpu = (statistics.median(s[i] / t[i] for s, t in pairs) for i in (0, 1))
        difference = abs(values[way] - values["sqrtm"]) / trace
        print(f"{way}: {wall:.1f}x the speed of sqrtm at D = {dim}, {cpu:.1f}x in CPU time,")
        print(f"  the values differ by {difference:.0e} of the trace")


def features(samples: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Standard deviations over three decades in directions of no single feature, cut at 0."""
    mixing = np.random.default_rng(0).standard_normal((dim, dim)) / np.sqrt(dim)
    latent = np.random.default_rng(seed).standard_normal((samples, dim))
    values: NDArray[np.float64] = latent * np.geomspace(1, 1e-3, dim) @ mixing
    return np.maximum(values, -0.05)


def fresh(gaussian: Gaussian) -> Gaussian:
    """The same without its kept root."""
    return Gaussian(gaussian.mean, gaussian.covariance, gaussian.n)


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    delta = a.mean - b.mean
    root = linalg.sqrtm(a.covariance @ b.covariance)
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(delta @ delta + traces - 2 * np.trace(root).real)


if __name__ == "__main__":
    main()
