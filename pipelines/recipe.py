"""What a person writes: `Recipe` (what is trained: identity) and `Cluster` (where: never identity).

Frozen, validated once (ValueError that begins with the field), never edited after load.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from consistency.config import (
    ConsistencyConfig,
    NetworkConfig,
    NoiseConfig,
    TeacherConfig,
    require,
)

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
class ReferenceConfig:
    """The feature net trained on the shards, and the statistics of the real images under it."""

    steps: int = 300
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps: {self.steps} must be > 0")
        require(self.batch > 0, f"batch: {self.batch} must be > 0")
        require(self.lr > 0, f"lr: {self.lr} must be > 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Samples of EMA weights with fixed noise, against the reference."""

    samples: int = 2_000
    teacher_samples: int = 1_000
    teacher_steps: int = 18  # Heun: 2 * steps - 1 evaluations
    mid_sigma: float = 0.821  # second noise level of two-step sampling (iCT, CIFAR-10)
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.samples > 1, f"samples: {self.samples} must be > 1")
        require(self.teacher_samples > 1, f"teacher_samples: {self.teacher_samples} must be > 1")
        require(self.teacher_steps >= 2, f"teacher_steps: {self.teacher_steps} must be >= 2")
        require(self.mid_sigma > 0, f"mid_sigma: {self.mid_sigma} must be > 0")


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Which candidate becomes a model version, and under which name and alias."""

    model: str
    alias: str = "champion"
    steps: Literal[1, 2] = 1  # the column candidates are ranked by
    max_distance: float | None = None  # percent; None: no absolute bound

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
    distill: ConsistencyConfig
    isolate: ConsistencyConfig
    reference: ReferenceConfig = ReferenceConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register: RegisterConfig

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed: {self.seed} must be >= 0")
        require(
            self.distill.path != "noise",
            "distill.path: distillation takes the teacher's ODE step (heun or euler)",
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


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where and how it runs. No field here may change what comes out."""

    address: str = "local"  # "local", "auto" or host:port of a running Ray
    workers: int = 1  # Ray Train workers per training stage
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.0
    workspace: str = "cmforge-workspace"  # folder or fsspec URL
    tracking_uri: str | None = None  # None: sqlite in the workspace
    checkpoint_every_seconds: float = 30.0
    checkpoints_kept: int = 2
    max_failures: int = 2  # of training workers, per stage
    retries: int = 1  # of a step whose process or node died

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"workers: {self.workers} must be >= 1")
        require(self.cpus_per_worker >= 1, f"cpus_per_worker: {self.cpus_per_worker} must be >= 1")
        require(self.gpus_per_worker >= 0, f"gpus_per_worker: {self.gpus_per_worker} must be >= 0")
        require(
            self.checkpoint_every_seconds >= 0,
            f"checkpoint_every_seconds: {self.checkpoint_every_seconds} must be >= 0",
        )
        require(
            self.checkpoints_kept >= 1, f"checkpoints_kept: {self.checkpoints_kept} must be >= 1"
        )
        require(self.max_failures >= 0, f"max_failures: {self.max_failures} must be >= 0")
        require(self.retries >= 0, f"retries: {self.retries} must be >= 0")
