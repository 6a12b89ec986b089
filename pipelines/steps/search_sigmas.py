"""search_sigmas: the noise levels at which samples of several steps lie nearest real images.

Every list of levels is a measurement of its own, whose sums lie in `work` under the list: a search
that was killed goes the same way again and measures only what is open.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING

from consistency.sigma_search import Outcome, Sigmas, search
from infra import storage
from pipelines.artifacts import Committed, ReferenceStats, SearchedModel, ShardSet, TrainedModel
from pipelines.dag import StepContext
from pipelines.measuring import SigmaSearchConfig
from pipelines.scoring import Job, Subject, measure_in_step
from pipelines.yardstick import Yardstick

if TYPE_CHECKING:
    from consistency.published import ModelDescription

TABLE = "sigmas.json"


@dataclass(frozen=True, kw_only=True)
class SearchStage:
    """Identity of the step."""

    search: SigmaSearchConfig
    mid_sigma: float  # the evaluation's second level of two steps: what is to be beaten


def step_name(candidate: str) -> str:
    """The step that searches for a candidate: each has its own."""
    return f"search_sigmas-{candidate}"


def run(
    ctx: StepContext,
    config: SearchStage,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    trained: Committed[TrainedModel],
) -> SearchedModel:
    """The same model with the levels that were found better; `sigmas.json` says how all scored."""
    from consistency.published import ModelDescription

    wanted = config.search
    own = ModelDescription.from_json(ctx.fetch(trained, "config.json").read_text())
    about = replace(own, mid_sigma=config.mid_sigma)
    weights = ctx.fetch(trained, "weights.safetensors")
    subject = Subject(
        name=trained.step,
        description="",  # of each list its own
        weights_url=storage.join(trained.url, "weights.safetensors"),
        weights_sha256=trained.value.weights_sha256,
    )
    measure = Measuring(ctx, Yardstick.of(shard, reference), subject, about, wanted)
    outcomes = search(
        measure.once,
        measure.confirming,
        default_levels(about),
        lowest=max(about.lowest_sigma, about.boundary, about.noise.sigma_min),
        steps=wanted.steps,
        grid=wanted.grid,
        tolerance=wanted.tolerance,
        evaluations=wanted.evaluations,
    )
    better = tuple(one.kept for one in outcomes if one.kept != one.default)

    shutil.copyfile(weights, ctx.out / "weights.safetensors")
    shutil.copyfile(ctx.fetch(trained, "curve.jsonl"), ctx.out / "curve.jsonl")
    (ctx.out / "config.json").write_text(replace(own, searched=better).to_json())
    (ctx.out / TABLE).write_text(json.dumps(table(outcomes, measure.rows), indent=1))
    return SearchedModel(
        **{**asdict(trained.value), "emas": (), "snapshots": ()},
        searched=better,
    )


def default_levels(about: "ModelDescription") -> Callable[[int], Sigmas]:
    """The sigmas at which a model samples in so many steps if none are searched."""
    plain = replace(about, searched=())

    def of(steps: int) -> Sigmas:
        if about.kind == "mean_flow":  # t = sigma / (1 + sigma), but for the first, which is 1
            times = plain.times(steps)[1:]
            return (about.noise.sigma_max, *(time / (1 - time) for time in times))
        return tuple(plain.sigmas(steps))

    return of


@dataclass
class Measuring:
    """A model's distance at any list of levels, with the same noise of sample i in all of them."""

    ctx: StepContext
    yardstick: Yardstick
    subject: Subject
    about: "ModelDescription"
    config: SigmaSearchConfig
    rows: list[dict[str, object]] = field(default_factory=list)  # every measurement, in order

    def once(self, lists: Sequence[Sigmas]) -> list[float]:
        asked = self.config
        return self._measure(lists, asked.samples, 1, asked.seed, confirms=False)

    def confirming(self, lists: Sequence[Sigmas]) -> list[float]:
        """Means over the seed blocks of the larger sample."""
        asked = self.config
        return self._measure(
            lists, asked.confirm_samples, asked.confirm_blocks, asked.seed + 1, confirms=True
        )

    def _measure(
        self,
        lists: Sequence[Sigmas],
        samples: int,
        seed_blocks: int,
        seed: int,
        *,
        confirms: bool,
    ) -> list[float]:
        jobs = [
            Job(
                subject=replace(
                    self.subject, description=replace(self.about, searched=(sigmas,)).to_json()
                ),
                protocol=self.yardstick.protocol(
                    samples=samples,
                    seed_blocks=seed_blocks,
                    seed=seed,
                    steps=len(sigmas),
                    allow_rank_deficient=self.config.allow_rank_deficient,
                ),
            )
            for sigmas in lists
        ]
        found = measure_in_step(self.ctx, self.yardstick, jobs)
        for sigmas, job, one in zip(lists, jobs, found, strict=True):
            self.rows.append(
                {
                    "steps": len(sigmas),
                    "sigmas": sigmas,
                    "confirms": confirms,
                    "metric": job.protocol.name,
                    "protocol": job.protocol.digest,
                    "values": [v if math.isfinite(v) else None for v in one.values],
                }
            )
        return [fmean(one.values) for one in found]


def table(
    outcomes: Sequence[Outcome], rows: Sequence[dict[str, object]]
) -> dict[str, list[dict[str, object]]]:
    """What `sigmas.json` holds: what was decided of each number of steps, and all that was seen."""
    decided: list[dict[str, object]] = [
        {
            "steps": one.steps,
            "default": one.default,
            "found": one.found,
            "kept": one.kept,
            "searched": one.kept != one.default,
            "confirmed": [
                {"sigmas": sigmas, "value": value if math.isfinite(value) else None}
                for sigmas, value in one.confirmed.items()
            ],
        }
        for one in outcomes
    ]
    return {"decided": decided, "measured": list(rows)}
