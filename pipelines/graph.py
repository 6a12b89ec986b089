"""The product on one page: which steps there are, and what each needs.

shard -+-> reference --------------------------+
       +-> teacher -+-> distill ---------------+-> evaluate -> register -> report
       |            +- - - - - - -> (weights)  |
       +-> isolate (from scratch: beside all) -+
"""

from functools import partial

from consistency.config import ConsistencyConfig, TeacherConfig
from infra import tracking
from pipelines.artifacts import (
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Report,
    ShardSet,
    TrainedModel,
)
from pipelines.config import resolved_yaml
from pipelines.dag import Step
from pipelines.recipe import Cluster, Recipe
from pipelines.steps import distill, evaluate, isolate, reference, register, report, shard, teacher
from pipelines.training import StageConfig


def build(recipe: Recipe, cluster: Cluster) -> list[Step]:
    """The steps of a recipe, each after its inputs; the last one is the target.

    Of the cluster only the registry matters: a model registered in one is not in another. Raises
    UserError when the source images are not there.
    """
    source = shard.ShardConfig.of(recipe.data)
    shards = Step(name="shard", run=shard.run, config=source, returns=ShardSet)
    yardstick = Step(
        name="reference",
        on_gpu=True,
        written=("", "reference."),
        run=reference.run,
        config=recipe.reference,
        returns=ReferenceStats,
        inputs={"shard": shards},
    )
    diffusion = Step(
        name="teacher",
        written=("training.", "teacher."),
        run=teacher.run,
        config=_stage(recipe, recipe.teacher),
        returns=TrainedModel,
        inputs={"shard": shards},
        cpus=0,
        trains=True,
    )
    distilled = Step(
        name="distill",
        written=("training.", "distill."),
        run=distill.run,
        config=_stage(recipe, recipe.distill),
        returns=TrainedModel,
        inputs={"shard": shards, "teacher": diffusion},
        cpus=0,
        trains=True,
    )
    from_teacher = {"teacher": diffusion} if recipe.isolate.uses_teacher else {}
    isolated = Step(
        name="isolate",
        written=("training.", "isolate."),
        run=isolate.run,
        config=_stage(recipe, recipe.isolate),
        returns=TrainedModel,
        inputs={"shard": shards, **from_teacher},
        cpus=0,
        trains=True,
    )
    evaluated = Step(
        name="evaluate",
        on_gpu=True,
        written=("", "evaluate."),
        run=evaluate.run,
        config=recipe.evaluate,
        returns=Evaluation,
        inputs={
            "shard": shards,
            "reference": yardstick,
            "teacher": diffusion,
            "distill": distilled,
            "isolate": isolated,
        },
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
        inputs={
            "shard": shards,
            "teacher": diffusion,
            "evaluate": evaluated,
            "distill": distilled,
            "isolate": isolated,
        },
    )
    page = Step(
        name="report",
        run=report.run,
        config=report.ReportConfig(
            recipe_name=recipe.name,
            recipe_yaml=resolved_yaml(recipe),
            isolate_uses_teacher=recipe.isolate.uses_teacher,
        ),
        returns=Report,
        inputs={
            "shard": shards,
            "reference": yardstick,
            "teacher": diffusion,
            "distill": distilled,
            "isolate": isolated,
            "evaluate": evaluated,
            "register": registered,
        },
    )
    return [shards, yardstick, diffusion, distilled, isolated, evaluated, registered, page]


def _stage(recipe: Recipe, training: TeacherConfig | ConsistencyConfig) -> StageConfig:
    return StageConfig(
        network=recipe.network, noise=recipe.noise, training=training, seed=recipe.seed
    )
