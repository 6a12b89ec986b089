"""How models are measured and chosen from: those parts of a recipe."""

from dataclasses import dataclass, field
from typing import Literal

from consistency.config import ChurnConfig, require, require_share

SetMetric = Literal["kid", "inception_score", "precision_recall", "fd_infinity"]


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The feature network, and the statistics of the real images under it.

    The first extractor of the list whose weights are at hand is taken: an explicit choice, and it
    decides the metric's name. `domain` is a classifier trained on the shards; it needs no weights.
    """

    # What is found and the hashes stand for these three (graph.py): where files lie is not what
    # they are.
    extractor: tuple[str, ...] = field(default=("domain",), metadata={"identity": False})
    weights: str | None = field(default=None, metadata={"identity": False})  # file or folder
    # .npz of another project instead of the shards' own statistics
    statistics: str | None = field(default=None, metadata={"identity": False})
    steps: int = 300  # of training the domain net
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.extractor) > 0, "extractor: name at least one (domain needs no weights)")
        require(
            self.statistics is None or "domain" not in self.extractor,
            "statistics: belong to a fixed network; reference.extractor must not name domain",
        )
        require(self.steps > 0, f"steps: {self.steps} must be > 0")
        require(self.batch > 0, f"batch: {self.batch} must be > 0")
        require(self.lr > 0, f"lr: {self.lr} must be > 0")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Samples of EMA weights with fixed noise, against the reference."""

    samples: int = 2_000  # per seed block
    seed_blocks: int = 3  # disjoint sets of samples: their spread is the number's uncertainty
    teacher_samples: int = 1_000  # of its many-step samples, in one block
    teacher_steps: int = 18  # Heun: 2 * steps - 1 evaluations
    teacher_guidance: float = 1.0  # classifier-free guidance of the teacher's samples; 1 is none
    teacher_churn: ChurnConfig | None = None  # None: the deterministic sampler
    mid_sigma: float = 0.821  # second noise level of two-step sampling (iCT, CIFAR-10)
    also: tuple[SetMetric, ...] = ()  # of the first seed block, beside the distance
    allow_rank_deficient: bool = False  # samples <= features: the distance is mostly bias
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.samples > 1, f"samples: {self.samples} must be > 1")
        require(self.seed_blocks > 0, f"seed_blocks: {self.seed_blocks} must be > 0")
        require(self.teacher_samples > 1, f"teacher_samples: {self.teacher_samples} must be > 1")
        require(self.teacher_steps >= 2, f"teacher_steps: {self.teacher_steps} must be >= 2")
        require(self.mid_sigma > 0, f"mid_sigma: {self.mid_sigma} must be > 0")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which length of the sampling EMA is published: each is scored as `evaluate` would.

    Candidates are the EMAs that were trained, and lengths rebuilt from snapshots (`snapshots` of
    the training stage) of its power EMAs (Sec. 3.2, EDM2).
    """

    sigma_rel: tuple[float, ...] = (0.05, 0.10, 0.15, 0.20)  # lengths to rebuild
    samples: int = 1_000
    steps: Literal[1, 2] = 1
    allow_rank_deficient: bool = False
    seed: int = 1  # other noise than the evaluation's: it chooses, evaluate judges

    def __post_init__(self) -> None:
        require(
            all(0 < width < 0.28 for width in self.sigma_rel),
            f"sigma_rel: {list(self.sigma_rel)} must lie in (0, 0.28)",
        )
        require(self.samples > 1, f"samples: {self.samples} must be > 1")


@dataclass(frozen=True, kw_only=True)
class SigmaSearchConfig:
    """Which noise levels a candidate samples at in several steps: found greedily, each scored as
    `evaluate` would, and kept where a larger sample confirms that they beat the default ones."""

    steps: int = 2  # the longest list of levels; each shorter one is found on the way
    samples: int = 1_000
    confirm_samples: int = 2_000  # per seed block
    confirm_blocks: int = 3
    grid: int = 8  # levels that find the valleys
    tolerance: float = 0.2  # width of a valley, in ln sigma, at which its floor is found
    evaluations: int = 24  # lists measured for one level, at most
    allow_rank_deficient: bool = False
    seed: int = 3  # the confirmation takes the next one: other noise, as the evaluation's is

    def __post_init__(self) -> None:
        require(2 <= self.steps <= 64, f"steps: {self.steps} must be in 2 to 64")
        require(self.samples > 1, f"samples: {self.samples} must be > 1")
        require(self.confirm_samples > 1, f"confirm_samples: {self.confirm_samples} must be > 1")
        require(self.confirm_blocks > 0, f"confirm_blocks: {self.confirm_blocks} must be > 0")
        require(self.grid >= 3, f"grid: {self.grid} must be >= 3")
        require(0.01 <= self.tolerance <= 2, f"tolerance: {self.tolerance} must be in 0.01 to 2")
        require(
            self.evaluations > self.grid,
            f"evaluations: {self.evaluations} must be > grid ({self.grid}), which comes first",
        )


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Evaluation while a stage trains. It changes no weights, so it is no part of any identity."""

    every_images: int
    samples: int = 1_000
    share: float = 0.05  # of the training time, at most; probes that would exceed it are skipped
    stop_above: float | None = 4.0  # times the best distance: diverging; None: never stop
    patience: int = 3  # evaluations running
    allow_rank_deficient: bool = False
    seed: int = 2

    def __post_init__(self) -> None:
        require(self.every_images > 0, f"every_images: {self.every_images} must be > 0")
        require(self.samples > 1, f"samples: {self.samples} must be > 1")
        require_share("share", self.share)
        require(
            self.stop_above is None or self.stop_above > 1,
            f"stop_above: {self.stop_above} must be > 1",
        )
        require(self.patience > 0, f"patience: {self.patience} must be > 0")
