"""N(k), mu(k) and the relative gap over a schedule, from the very functions that training uses."""

from dataclasses import replace

from consistency.config import NoiseConfig
from consistency.method_config import ConsistencyConfig, RatioPairs, StageTraining, TargetEMA
from consistency.objectives.base import Progress
from consistency.objectives.pairs import num_levels
from consistency.schedules import ect_r, ect_stage, karras_sigmas, mu_adaptive
from pipelines.sweep_summary import Schedule

POINTS = 200


def schedule_of(trial: int, training: StageTraining, noise: NoiseConfig) -> Schedule:
    """At POINTS + 1 equal fractions of the schedule, both ends included."""
    import torch

    empty = Schedule(
        trial=trial,
        fractions=tuple(n / POINTS for n in range(POINTS + 1)),
        N=None,
        mu=None,
        gap=None,
    )
    if not isinstance(training, ConsistencyConfig):
        return empty  # continuous time: no levels, no target network
    # As the loop counts, in images; the last step begins before the end.
    K = training.steps
    steps = [min(round(fraction * K), K - 1) for fraction in empty.fractions]
    progress = [Progress(step * training.batch, training.images) for step in steps]
    one = torch.ones(())
    pairs = training.pairs
    levels: tuple[int, ...] | None = None
    if isinstance(pairs, RatioPairs):
        stages = [ect_stage(p.images, p.total, pairs.stages) for p in progress]
        clean = {s: ect_r(one, s, pairs.q, pairs.k, pairs.b, pairs.max_ratio) for s in set(stages)}
        gap = tuple(1 - clean[stage].item() for stage in stages)
    else:
        levels = tuple(num_levels(pairs.levels, p) for p in progress)
        gaps = {N: _gap_at_one(N, noise) for N in set(levels)}
        gap = tuple(gaps[N] for N in levels)
    mu: tuple[float, ...] | None = None
    if isinstance(training.target, TargetEMA):
        target = training.target
        mu = (target.mu,) * len(progress)
        if target.adaptive_s0 > 0:
            assert levels is not None, "checked by the config"
            adaptive = (target.adaptive_s0, target.mu, target.variant)
            mu = tuple(mu_adaptive(N, *adaptive) for N in levels)
    return replace(empty, N=levels, mu=mu, gap=gap)


def _gap_at_one(N: int, noise: NoiseConfig) -> float:
    """1 - r/t of the grid's interval that holds t = 1 (or of the nearest one)."""
    import torch

    grid = karras_sigmas(N, noise.sigma_min, noise.sigma_max, noise.rho)
    above = int(torch.searchsorted(grid, 1.0).clamp(1, N - 1))
    return 1 - (grid[above - 1] / grid[above]).item()
