"""The product on one page: which steps there are, and what each needs.

shard -+-> reference --------------------------+
       +-> teacher -+-> distill ---------------+-> evaluate -> register -> report
       |            +- - - - - - -> (weights)  |
       +-> isolate (from scratch: beside all) -+

On request: `truncate` follows isolate or distill as one more candidate, and a `select_ema` stands
between each candidate and evaluate.
"""

from functools import partial

from consistency.evaluation.protocol import DOMAIN, DOMAIN_FEATURES
from consistency.evaluation.specs import SPECS
from consistency.method_config import ConsistencyConfig, StageTraining
from infra import storage, tracking
from infra.errors import UserError
from pipelines import weights
from pipelines.artifacts import (
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Report,
    ShardSet,
    TrainedModel,
)
from pipelines.config import resolved_yaml
from pipelines.dag import Step, home_of
from pipelines.recipe import Cluster, Recipe
from pipelines.steps import (
    distill,
    evaluate,
    isolate,
    reference,
    register,
    report,
    select_ema,
    shard,
    teacher,
    truncate,
)
from pipelines.training import StageConfig
from pipelines.watch import WatchJob
from pipelines.yardstick import check_rank


def build(recipe: Recipe, cluster: Cluster) -> list[Step]:
    """The steps of a recipe, each after its inputs; the last one is the target.

    Of the cluster only the registry matters: a model registered in one is not in another. Raises
    UserError when the source images are not there.
    """
    source = shard.ShardConfig.of(recipe.data)
    shards = Step(name="shard", run=shard.run, config=source, returns=ShardSet)
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
    diffusion = Step(
        name="teacher",
        written=("training.", "teacher."),
        run=teacher.run,
        config=_stage(recipe, "teacher", recipe.teacher, watch),
        returns=TrainedModel,
        inputs={"shard": shards},
        cpus=0,
        gang="workers",
    )
    distilled = Step(
        name="distill",
        written=("training.", "distill."),
        run=distill.run,
        config=_stage(recipe, "distill", recipe.distill, watch),
        returns=TrainedModel,
        inputs={"shard": shards, "teacher": diffusion},
        cpus=0,
        gang="workers",
    )
    from_teacher = {"teacher": diffusion} if recipe.isolate.uses_teacher else {}
    isolated = Step(
        name="isolate",
        written=("training.", "isolate."),
        run=isolate.run,
        config=_stage(recipe, "isolate", recipe.isolate, watch),
        returns=TrainedModel,
        inputs={"shard": shards, **from_teacher},
        cpus=0,
        gang="workers",
    )
    trained = {"distill": distilled, "isolate": isolated}
    if recipe.truncate is not None:
        trained["truncate"] = Step(
            name="truncate",
            written=("training.", "truncate."),
            run=truncate.run,
            config=_stage(recipe, "truncate", recipe.truncate, watch),
            returns=TrainedModel,
            inputs={"shard": shards, "first": trained[recipe.truncate.of]},
            cpus=0,
            gang="workers",
        )
    candidates = trained
    if recipe.select_ema is not None:
        selection = select_ema.SelectStage(
            select=recipe.select_ema, mid_sigma=recipe.evaluate.mid_sigma
        )
        candidates = {
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
        }
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
    selected = {} if candidates is trained else {s.name: s for s in candidates.values()}
    page = Step(
        name="report",
        run=report.run,
        config=report.ReportConfig(
            recipe_name=recipe.name,
            recipe_yaml=resolved_yaml(recipe),
            isolate_uses_teacher=recipe.isolate.uses_teacher,
            truncates=recipe.truncate.of if recipe.truncate else None,
        ),
        returns=Report,
        inputs={
            "shard": shards,
            "reference": yardstick,
            "teacher": diffusion,
            "evaluate": evaluated,
            "register": registered,
            **trained,
            **selected,
        },
    )
    return [
        shards,
        yardstick,
        diffusion,
        *trained.values(),
        *selected.values(),
        evaluated,
        registered,
        page,
    ]


def _stage(
    recipe: Recipe, name: str, training: StageTraining, watch: WatchJob | None
) -> StageConfig:
    lpips = training.lpips if isinstance(training, ConsistencyConfig) else None
    return StageConfig(
        network=recipe.network,
        noise=recipe.noise,
        training=training,
        seed=recipe.seed,
        lpips_sha256=None if lpips is None else _digest(f"{name}.lpips", lpips),
        watch=watch,
    )


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
        else _digest("reference.statistics", statistics),
    )


def _check_ranks(recipe: Recipe, dim: int) -> None:
    """Before days of training, not after."""
    evaluation, select = recipe.evaluate, recipe.select_ema
    for key in ("samples", "teacher_samples"):
        samples, allowed = getattr(evaluation, key), evaluation.allow_rank_deficient
        check_rank(samples, dim, allowed, f"evaluate.{key}")
    if select is not None:
        check_rank(select.samples, dim, select.allow_rank_deficient, "select_ema.samples")
    if recipe.watch is not None:
        check_rank(recipe.watch.samples, dim, recipe.watch.allow_rank_deficient, "watch.samples")


def _digest(key: str, url: str) -> str:
    """What stands for a file in an identity."""
    if not storage.exists(url):
        raise UserError(f"{key}: {url} does not exist; check the spelling or mount it")
    return storage.sha256(storage.absolute(url))
