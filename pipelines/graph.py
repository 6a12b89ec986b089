"""The product on one page: which steps there are, and what each needs.

shard -+-> reference --------------------------+
       +-> teacher -+-> distill ---------------+-> evaluate -> register -> report
       |            +- - - - - - -> (weights)  |
       +-> isolate (from scratch: beside all) -+

On request: `truncate` follows isolate or distill as one more candidate, a `select_ema` and then a
`search_sigmas` stand between each candidate and evaluate, and a `tune` before the stage whose
settings it searches. Where a recipe names a model from outside (`teacher.from`), the stage's step
copies it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from consistency.evaluation.protocol import DOMAIN, DOMAIN_FEATURES
from consistency.evaluation.specs import SPECS
from infra import tracking
from pipelines import adopting, weights
from pipelines.adopted import Adopted
from pipelines.artifacts import (
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Report,
    SearchedModel,
    ShardSet,
    TrainedModel,
    Tuned,
)
from pipelines.config import RecipeSource, resolved_yaml
from pipelines.dag import Step, home_of
from pipelines.recipe import Cluster, Recipe
from pipelines.steps import (
    adopt,
    distill,
    evaluate,
    isolate,
    reference,
    register,
    report,
    search_sigmas,
    select_ema,
    shard,
    teacher,
    truncate,
    tune,
)
from pipelines.sweep import SweepConfig
from pipelines.sweeping import TuneStage
from pipelines.training import StageConfig, digest
from pipelines.watch import WatchJob
from pipelines.yardstick import check_rank


def build(recipe: Recipe, cluster: Cluster, source: RecipeSource | None = None) -> list[Step]:
    """The steps of a recipe, each after its inputs; the last one is the target.

    Of the cluster only the registry matters: a model registered in one is not in another. `source`
    is the text that the recipe was read from, for sweeps to vary (default: the recipe, resolved).
    Raises UserError when the source images are not there, or an adopted model is not or does not
    fit.
    """
    models = adopting.find(recipe)
    recipe = adopting.resolved(recipe, models)
    if source is None:
        source = RecipeSource(recipe.name, resolved_yaml(replace(recipe, tune=())))
    elif "teacher" in models:
        source = replace(source, adopted=adopting.overrides(recipe))
    images = shard.ShardConfig.of(recipe.data)
    shards = Step(name="shard", run=shard.run, config=images, returns=ShardSet)
    yardstick = Step(
        name="reference",
        written=("reference.", "reference."),
        run=reference.run,
        config=_reference(recipe),
        returns=ReferenceStats,
        inputs={"shard": shards},
        cpus=0,  # it trains the domain net before it asks for evaluators
        gang="evaluators",
    )
    watch = None
    if recipe.watch is not None:
        watch = WatchJob(
            config=recipe.watch,
            reference=home_of(cluster.workspace, yardstick),
            mid_sigma=recipe.evaluate.mid_sigma,
            teacher_steps=recipe.evaluate.teacher_steps,
        )

    def model(stage: str, run: Callable[..., TrainedModel], **inputs: Step) -> Step:
        if stage in models:
            return _adopted(stage, models[stage], shards)
        return Step(
            name=stage,
            written=("training.", f"{stage}."),
            run=run,
            config=StageConfig.of(adopting.basis(recipe, models, stage), stage, watch),
            returns=TrainedModel,
            inputs={"shard": shards, **inputs},
            cpus=0,
            gang="workers",
        )

    diffusion = model("teacher", teacher.run)
    seen = {"shard": shards, "reference": yardstick, "teacher": diffusion}
    tunings: dict[str, Step] = {}
    if (sweep := _sweep_of(recipe, "distill")) is not None:
        tunings["distill"] = _tuning(recipe, sweep, source, seen)
    distilled = model("distill", distill.run, teacher=diffusion, **_tuned(tunings, "distill"))
    sources = {
        "scratch": {},
        "teacher": {"teacher": diffusion},
        "distilled": {"distilled": distilled},
    }
    begins_with = sources[recipe.isolate.init]
    if (sweep := _sweep_of(recipe, "isolate")) is not None:
        if _may_begin_with_distilled(recipe, sweep):
            seen["distilled"] = distilled
        tunings["isolate"] = _tuning(recipe, sweep, source, seen)
        begins_with = {name: seen[name] for name in ("teacher", "distilled") if name in seen}
    isolated = model("isolate", isolate.run, **begins_with, **_tuned(tunings, "isolate"))
    trained = {"distill": distilled, "isolate": isolated}
    if recipe.truncate is not None:
        trained["truncate"] = model("truncate", truncate.run, first=trained[recipe.truncate.of])
    candidates = trained
    refined: dict[str, Step] = {}
    if recipe.select_ema is not None:
        selection = select_ema.SelectStage(
            select=recipe.select_ema, mid_sigma=recipe.evaluate.mid_sigma
        )
        selected = {  # an adopted model has one set of weights, and so no choice
            name: Step(
                name=select_ema.step_name(name),
                written=("select.", "select_ema."),
                run=select_ema.run,
                config=selection,
                returns=TrainedModel,
                inputs={"shard": shards, "reference": yardstick, "trained": step},
                cpus=0,
                gang="evaluators",
            )
            for name, step in trained.items()
            if name not in models
        }
        candidates = {**trained, **selected}
        refined |= {step.name: step for step in selected.values()}
    if recipe.search_sigmas is not None:
        searching = search_sigmas.SearchStage(
            search=recipe.search_sigmas, mid_sigma=recipe.evaluate.mid_sigma
        )
        candidates = {
            name: Step(
                name=search_sigmas.step_name(name),
                written=("search.", "search_sigmas."),
                run=search_sigmas.run,
                config=searching,
                returns=SearchedModel,
                inputs={"shard": shards, "reference": yardstick, "trained": step},
                cpus=0,
                gang="evaluators",
            )
            for name, step in candidates.items()
        }
        refined |= {step.name: step for step in candidates.values()}
    evaluated = Step(
        name="evaluate",
        written=("", "evaluate."),
        run=evaluate.run,
        config=recipe.evaluate,
        returns=Evaluation,
        inputs={"shard": shards, "reference": yardstick, "teacher": diffusion, **candidates},
        cpus=0,
        gang="evaluators",
    )
    registered = Step(
        name="register",
        run=register.run,
        config=register.RegisterStage(
            register=recipe.register,
            recipe=recipe.name,
            registry=tracking.without_secrets(cluster.tracking_uri or "workspace"),
        ),
        returns=RegisteredModel,
        lost=partial(register.lost, cluster.tracking_uri, cluster.workspace),
        inputs={"shard": shards, "teacher": diffusion, "evaluate": evaluated, **candidates},
    )
    page = Step(
        name="report",
        run=report.run,
        config=report.ReportConfig(
            recipe_name=recipe.name,
            recipe_yaml=resolved_yaml(recipe),
            isolate_from="scratch" if "isolate" in models else recipe.isolate.init,
            truncates=recipe.truncate.of if recipe.truncate else None,
            after_distill=tuple(s.name for s in tunings.values() if "distilled" in s.inputs),
        ),
        returns=Report,
        inputs={
            "shard": shards,
            "reference": yardstick,
            "teacher": diffusion,
            "evaluate": evaluated,
            "register": registered,
            **trained,
            **refined,
            **{step.name: step for step in tunings.values()},
        },
    )
    return [
        shards,
        yardstick,
        diffusion,
        *(
            step
            for name, stage in trained.items()
            for step in (*_tuned(tunings, name).values(), stage)
        ),
        *refined.values(),
        evaluated,
        registered,
        page,
    ]


def _adopted(stage: str, model: Adopted, shards: Step) -> Step:
    """In the stage's place; the data say whether the model draws images like them."""
    return Step(
        name=stage,
        written=("kind", f"{stage}.from"),
        run=adopt.run,
        config=adopt.AdoptStage.of(model),
        returns=TrainedModel,
        inputs={"shard": shards},
    )


def _sweep_of(recipe: Recipe, stage: str) -> SweepConfig | None:
    return next((sweep for sweep in recipe.tune if sweep.stage == stage), None)


def _tuning(
    recipe: Recipe, sweep: SweepConfig, source: RecipeSource, inputs: Mapping[str, Step]
) -> Step:
    return Step(
        name=tune.step_name(sweep.stage),
        run=tune.run,
        config=TuneStage(
            sweep=sweep,
            stage=StageConfig.of(recipe, sweep.stage),
            mid_sigma=recipe.evaluate.mid_sigma,
            source=source,
        ),
        returns=Tuned,
        inputs=dict(inputs),
        cpus=0,
        gang="trials",
    )


def _tuned(tunings: Mapping[str, Step], stage: str) -> dict[str, Step]:
    """The input of a stage whose settings are searched."""
    return {"tune": tunings[stage]} if stage in tunings else {}


def _may_begin_with_distilled(recipe: Recipe, sweep: SweepConfig) -> bool:
    """Whether a trial may need the distilled model's weights."""
    key = "isolate.init"
    texts = [*sweep.fixed, *(f"{a.key}={value}" for a in sweep.space for value in a.choice)]
    return recipe.isolate.init == "distilled" or f"{key}=distilled" in texts


def _reference(recipe: Recipe) -> reference.ReferenceStage:
    """Which feature network it will be, by its hash; refused here if numbers would be mere bias."""
    config = recipe.reference
    found = weights.resolve(config.extractor, config.weights)
    spec = SPECS.get(found.name)
    if found.name == DOMAIN or spec is not None:
        dim = DOMAIN_FEATURES if spec is None else spec.dim
        _check_ranks(recipe, dim)
    statistics = config.statistics
    return reference.ReferenceStage(
        reference=config,
        extractor=found.name,
        weights_sha256=found.sha256,
        weights_path=None if found.path is None else str(found.path),
        statistics_sha256=None
        if statistics is None
        else digest("reference.statistics", statistics),
    )


def _check_ranks(recipe: Recipe, dim: int) -> None:
    """Before days of training, not after."""
    evaluation, select = recipe.evaluate, recipe.select_ema
    for key in ("samples", "teacher_samples"):
        samples, allowed = getattr(evaluation, key), evaluation.allow_rank_deficient
        check_rank(samples, dim, allowed, f"evaluate.{key}")
    if select is not None:
        check_rank(select.samples, dim, select.allow_rank_deficient, "select_ema.samples")
    if (searching := recipe.search_sigmas) is not None:
        for key in ("samples", "confirm_samples"):
            samples, allowed = getattr(searching, key), searching.allow_rank_deficient
            check_rank(samples, dim, allowed, f"search_sigmas.{key}")
    if recipe.watch is not None:
        check_rank(recipe.watch.samples, dim, recipe.watch.allow_rank_deficient, "watch.samples")
