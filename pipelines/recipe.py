"""What a person writes: `Recipe` (what is trained: identity) and `Cluster` (where: never identity).

Frozen, validated once (ValueError that begins with the field), never edited after load.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from consistency.config import (
    NetworkConfig,
    NoiseConfig,
    TeacherConfig,
    require,
)
from consistency.method_config import (
    DistillConfig,
    IsolateConfig,
    MeanFlowConfig,
    SCMConfig,
    TruncateConfig,
)
from pipelines.measuring import (
    EvaluateConfig,
    ReferenceConfig,
    SelectConfig,
    SigmaSearchConfig,
    WatchConfig,
)
from pipelines.sweep import SweepConfig

SourceKind = Literal["digits", "idx", "folder", "npz", "cifar10", "sheets"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Real images in; WebDataset shards out."""

    source: SourceKind = "digits"
    # Folder, file or fsspec URL; `digits` is embedded and has none. Where images lie is not what
    # they are: a digest of the files themselves stands for them (steps/shard.py).
    path: str | None = field(default=None, metadata={"identity": False})
    size: int | None = None  # side in pixels; None keeps the source's own
    fit: Literal["crop", "pad"] = "crop"
    split: Literal["train", "test"] = "train"
    labels: str | None = None  # npz: name of the label array; sheets: name of the label file
    limit: int | None = None  # so many images: the first ones; folder: spread over its files
    num_shards: int = 4
    record_images: int = 500  # images per tar record
    seed: int = 0  # of the permutation that mixes classes over shards

    def __post_init__(self) -> None:
        require(
            self.source == "digits" or self.path is not None,
            f"path: source {self.source} needs one (data.path=FOLDER or URL)",
        )
        require(
            self.source != "digits" or self.path is None,
            "path: source digits is embedded and takes none",
        )
        require(
            self.source != "folder" or self.size is not None,
            "size: source folder needs the side in pixels (data.size=32)",
        )
        require(
            self.labels is None or self.source in ("npz", "sheets"),
            f"labels: source {self.source} brings its own; leave it out (npz and sheets take it)",
        )
        require(self.labels != "", "labels: is empty; give a name, or leave it out")
        require(self.size is None or self.size >= 8, f"size: {self.size} must be >= 8")
        require(self.limit is None or self.limit > 0, f"limit: {self.limit} must be > 0")
        require(self.num_shards > 0, f"num_shards: {self.num_shards} must be > 0")
        require(self.record_images > 0, f"record_images: {self.record_images} must be > 0")


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Which candidate becomes a model version, and under which name and alias."""

    model: str
    alias: str = "champion"
    steps: Literal[1, 2] = 1  # the column candidates are ranked by
    max_distance: float | None = None  # in the metric's unit; None: no absolute bound
    allow_proxy: bool = False  # may a metric that is not FID move the alias?

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.model) is not None,
            f"model: {self.model!r} may hold letters, digits, '-', '_' and '.'",
        )
        require(
            re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.alias) is not None
            and self.alias.lower() != "latest"
            and re.fullmatch(r"[vV]\d+", self.alias) is None,
            f"alias: {self.alias!r} is not a legal MLflow alias",
        )
        require(
            self.max_distance is None or self.max_distance > 0,
            f"max_distance: {self.max_distance} must be > 0",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out."""

    name: str
    seed: int = 0
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    network: NetworkConfig = NetworkConfig()
    teacher: TeacherConfig
    distill: DistillConfig
    isolate: IsolateConfig
    truncate: TruncateConfig | None = None  # TCM's second stage; None: no such step
    select_ema: SelectConfig | None = None  # None: the first EMA of each stage is published
    search_sigmas: SigmaSearchConfig | None = None  # None: evaluate.mid_sigma, and Karras levels
    reference: ReferenceConfig = ReferenceConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    watch: WatchConfig | None = None  # None: stages train without looking
    tune: tuple[SweepConfig, ...] = ()  # searches between teacher and the stage each is for
    register: RegisterConfig

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: {self.seed} must be >= 0")
        require(
            self.distill.path != "noise",
            "distill.path: distillation asks the teacher (heun or euler; of scm: teacher)",
        )
        require(
            self.distill.init != "distilled",
            "distill.init: distillation makes the distilled model (teacher, or scratch)",
        )
        require(
            self.isolate.path == "noise",
            "isolate.path: isolation training has no teacher in the loss (noise)",
        )
        require(
            self.noise.sigma_min < self.evaluate.mid_sigma < self.noise.sigma_max,
            f"evaluate.mid_sigma: {self.evaluate.mid_sigma} must lie between noise.sigma_min "
            f"and noise.sigma_max",
        )
        require(
            self.truncate is None
            or self.noise.sigma_min < self.truncate.sigma_prime < self.noise.sigma_max,
            "truncate.sigma_prime: must lie between noise.sigma_min and noise.sigma_max",
        )
        require(
            self.truncate is None
            or self.truncate.of != "isolate"
            or self.adopts("isolate")
            or not isinstance(self.isolate, MeanFlowConfig),
            "truncate.of: isolate trains a MeanFlow, which has no f to truncate; take another "
            "method there, or of: distill",
        )
        require(
            self.reference.statistics is None
            or not {"kid", "precision_recall"}.intersection(self.evaluate.also),
            "evaluate.also: kid and precision_recall need features of real images, which the file "
            "of reference.statistics has not; leave one of the two out",
        )
        stages = [sweep.stage for sweep in self.tune]
        require(len(set(stages)) == len(stages), "tune: two sweeps are for one stage; keep one")
        for stage in stages:
            require(
                not self.adopts(stage),
                f"tune: {stage} is adopted ({stage}.from), so there is nothing to search; leave "
                f"one of the two out",
            )
        self._require_one_boundary()
        self._require_classes()
        self._require_a_choice()

    def _require_one_boundary(self) -> None:
        """The second stage of TCM asks the first one, so both are the identity at one sigma."""
        if self.truncate is None:
            return
        if self.adopts(self.truncate.of):
            return  # only the model itself says (adopting.py)
        first = self.isolate if self.truncate.of == "isolate" else self.distill
        assert not isinstance(first, MeanFlowConfig)
        its = 0.0 if isinstance(first, SCMConfig) else first.boundary
        own, its = (
            self.noise.sigma_min if at is None else at for at in (self.truncate.boundary, its)
        )
        require(
            own == its,
            f"truncate.boundary: {own:g} must be that of {self.truncate.of}, {its:g}",
        )

    def _require_a_choice(self) -> None:
        """Snapshots come of two power EMAs, so two entries are what every choice begins with."""
        stages = {"distill": self.distill, "isolate": self.isolate, "truncate": self.truncate}
        for name, stage in stages.items():
            if self.select_ema is None or stage is None or self.adopts(name):
                continue
            require(
                len(stage.ema) > 1,
                f"{name}.ema: select_ema has one EMA to choose from; give {name}.ema more entries "
                f"(of two power EMAs {name}.snapshots=16 keeps what any length is rebuilt from)",
            )

    def _require_classes(self) -> None:
        """Guidance needs classes, and a teacher that also learned the null class.

        Of an adopted teacher nothing tells whether it did: `teacher.label_dropout` says so.
        """
        wanted = {
            "distill.guidance": self.distill.guidance != 1 and not self.adopts("distill"),
            "evaluate.teacher_guidance": self.evaluate.teacher_guidance != 1,
        }
        aside = " (if the adopted model was trained so)" if self.adopts("teacher") else ""
        for key, on in wanted.items():
            require(
                not on or self.teacher.label_dropout > 0,
                f"{key}: needs a teacher with a null class; set teacher.label_dropout to 0.1"
                f"{aside}",
            )
        for key in () if self.adopts("teacher") else self.hiding_classes():
            require(
                self.network.class_conditional,
                f"{key}: hides classes, but network.class_conditional is false",
            )

    def hiding_classes(self) -> tuple[str, ...]:
        """The keys that mean something to a class-conditional network only."""
        isolate = self.isolate
        hides = {
            "teacher.label_dropout": self.teacher.label_dropout > 0,
            "isolate.label_dropout": isinstance(isolate, MeanFlowConfig)
            and isolate.label_dropout > 0
            and not self.adopts("isolate"),
        }
        return tuple(key for key, on in hides.items() if on)

    def adopts(self, stage: str) -> bool:
        """Whether a stage's model comes from outside."""
        return getattr(getattr(self, stage), "from_", None) is not None


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where and how it runs. No field here may change what comes out."""

    address: str = "local"  # "local", "auto" or host:port of a running Ray
    workers: int = 1  # Ray Train workers per training stage, and per trial of a sweep
    min_workers: int | None = None  # a stage goes on with so few while nodes are away; None: never
    trials: int = 2  # of a sweep, side by side; fewer where there is no room
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    workspace: str = "cmforge-workspace"  # folder or fsspec URL
    tracking_uri: str | None = None  # None: sqlite in the workspace
    evaluators: int = 2  # actors that sample and extract features; fewer where there is no room
    cpus_per_evaluator: int = 1
    gpus_per_evaluator: float = 0.0
    micro_batch: int | None = None  # images of a worker's forward pass; None: its whole share
    checkpoint_every_seconds: float = 30.0
    checkpoints_kept: int = 2
    max_failures: int = 2  # of training workers, in a row without a checkpoint in between
    retries: int = 2  # of a step whose process or node died, or whose store did not answer
    grace_seconds: float = 20.0  # after SIGTERM, for stages to save what they have

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"workers: {self.workers} must be >= 1")
        require(
            self.min_workers is None or 1 <= self.min_workers <= self.workers,
            f"min_workers: {self.min_workers} must be in 1..workers ({self.workers})",
        )
        require(self.cpus_per_worker >= 1, f"cpus_per_worker: {self.cpus_per_worker} must be >= 1")
        require(self.gpus_per_worker >= 0, f"gpus_per_worker: {self.gpus_per_worker} must be >= 0")
        require(self.trials >= 1, f"trials: {self.trials} must be >= 1")
        require(self.evaluators >= 1, f"evaluators: {self.evaluators} must be >= 1")
        require(
            self.cpus_per_evaluator >= 1,
            f"cpus_per_evaluator: {self.cpus_per_evaluator} must be >= 1",
        )
        require(
            self.gpus_per_evaluator >= 0,
            f"gpus_per_evaluator: {self.gpus_per_evaluator} must be >= 0",
        )
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            f"micro_batch: {self.micro_batch} must be >= 1",
        )
        require(
            self.checkpoint_every_seconds >= 0,
            f"checkpoint_every_seconds: {self.checkpoint_every_seconds} must be >= 0",
        )
        require(
            self.checkpoints_kept >= 1, f"checkpoints_kept: {self.checkpoints_kept} must be >= 1"
        )
        require(self.max_failures >= 0, f"max_failures: {self.max_failures} must be >= 0")
        require(self.grace_seconds >= 0, f"grace_seconds: {self.grace_seconds} must be >= 0")
        require(self.retries >= 0, f"retries: {self.retries} must be >= 0")
