"""The methods as frozen values: the parts of an objective, and the configuration of each stage.

Standard library only. Every class validates itself: ValueError whose text begins with the
offending field. `configs/methods/` holds the published settings.
"""

from dataclasses import dataclass, field
from typing import Literal

from consistency.config import (
    AdoptableConfig,
    TeacherConfig,
    TrainConfig,
    require,
    require_share,
)

# --- parts of a consistency objective -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConstantLevels:
    """N grid points throughout."""

    kind: Literal["constant"] = "constant"
    N: int = 18

    def __post_init__(self) -> None:
        require(self.N >= 2, f"N: {self.N} must be >= 2 (grid points, not intervals)")


@dataclass(frozen=True, kw_only=True)
class SqrtLevels:
    """N(k) of Song et al. 2023, Appendix C: from s0 to s1 + 1 points, growing like sqrt(k)."""

    kind: Literal["sqrt"] = "sqrt"
    s0: int = 2
    s1: int = 150

    def __post_init__(self) -> None:
        require(self.s0 >= 2, f"s0: {self.s0} must be >= 2")
        require(self.s1 >= self.s0, f"s1: {self.s1} must be >= s0 ({self.s0})")


@dataclass(frozen=True, kw_only=True)
class DoublingLevels:
    """N(k) of iCT: min(s0 2^floor(k/K'), s1) + 1 points."""

    kind: Literal["doubling"] = "doubling"
    s0: int = 10
    s1: int = 1280

    def __post_init__(self) -> None:
        require(self.s0 >= 1, f"s0: {self.s0} must be >= 1")
        require(self.s1 >= self.s0, f"s1: {self.s1} must be >= s0 ({self.s0})")


LevelsConfig = ConstantLevels | SqrtLevels | DoublingLevels


@dataclass(frozen=True, kw_only=True)
class UniformPairs:
    """(t_{n+1}, t_n), n uniform on the Karras grid of N(k) points (CM)."""

    kind: Literal["uniform"] = "uniform"
    levels: LevelsConfig = ConstantLevels()


@dataclass(frozen=True, kw_only=True)
class LognormalPairs:
    """(t_{n+1}, t_n), n drawn by the lognormal law discretised to the grid (iCT)."""

    kind: Literal["lognormal"] = "lognormal"
    levels: LevelsConfig = DoublingLevels()
    P_mean: float = -1.1
    P_std: float = 2.0

    def __post_init__(self) -> None:
        require(self.P_std > 0, f"P_std: {self.P_std} must be > 0")


@dataclass(frozen=True, kw_only=True)
class RatioPairs:
    """t lognormal, r(t) = t (1 - (1 + k sigmoid(-b t)) / q^(stage+1)), no grid (ECT)."""

    kind: Literal["ratio"] = "ratio"
    P_mean: float = -1.1
    P_std: float = 2.0
    q: float = 2.0
    stages: int = 8
    k: float = 8.0
    b: float = 1.0
    max_ratio: float | None = None  # cap on 1 - 1/q^(stage+1), and so on r/t

    def __post_init__(self) -> None:
        require(
            self.max_ratio is None or 0 < self.max_ratio < 1,
            f"max_ratio: {self.max_ratio} must be in (0, 1)",
        )
        require(self.P_std > 0, f"P_std: {self.P_std} must be > 0")
        require(self.q > 1, f"q: {self.q} must be > 1")
        require(self.stages >= 1, f"stages: {self.stages} must be >= 1")
        require(self.k >= 0, f"k: {self.k} must be >= 0")


PairsConfig = UniformPairs | LognormalPairs | RatioPairs


@dataclass(frozen=True, kw_only=True)
class TargetEMA:
    """The target network theta-: mu per step; adaptive mu(k) = exp(s0 ln mu0 / N(k)) if s0 > 0."""

    kind: Literal["ema"] = "ema"
    mu: float = 0.95
    adaptive_s0: int = 0
    variant: Literal["paper", "openai"] = "paper"

    def __post_init__(self) -> None:
        require(0 <= self.mu < 1, f"mu: {self.mu} must be in [0, 1)")
        require(self.adaptive_s0 >= 0, f"adaptive_s0: {self.adaptive_s0} must be >= 0")
        require(
            self.adaptive_s0 == 0 or self.mu > 0,
            "mu: must be > 0 when adaptive (it is the mu0 of the schedule)",
        )


@dataclass(frozen=True, kw_only=True)
class StopGradTarget:
    """theta- is theta itself under no_grad (iCT, ECT): no second network."""

    kind: Literal["stop_grad"] = "stop_grad"


TargetConfig = TargetEMA | StopGradTarget


# --- stages --------------------------------------------------------------------------------------

# The first weights: random ones, the teacher's, or (of isolation) those of the distilled model.
Init = Literal["scratch", "teacher", "distilled"]


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(AdoptableConfig):
    """The discrete family, one composition of parts: pairs x path x distance x weight x target.

    `method` is the name of the preset in `configs/methods/` that filled the keys left unsaid.
    """

    kind: Literal["discrete"] = "discrete"
    method: str
    init: Init
    pairs: PairsConfig
    path: Literal["heun", "euler", "noise"]  # teacher ODE step, or the same noise (CT)
    distance: Literal["l1", "squared_l2", "pseudo_huber", "lpips"] = "pseudo_huber"
    huber_c: float | None = None  # None: 0.00054 sqrt(dim), iCT
    # File of VGG16 and LPIPS weights. Where it lies is no identity, a digest of it is (graph.py).
    lpips: str | None = field(default=None, metadata={"identity": False})
    weight: Literal["uniform", "inverse_gap", "edm"] = "uniform"  # edm: 1 / c_out^2
    target: TargetConfig = StopGradTarget()
    # f is the identity at this sigma while training. None: noise.sigma_min; 0 gives EDM's
    # coefficients (ECT).
    boundary: float | None = None
    guidance: float = 1.0  # of the teacher on the path; 1 is none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.huber_c is None or self.huber_c >= 0, f"huber_c: {self.huber_c} must be >= 0")
        require(self.boundary is None or self.boundary >= 0, f"boundary: {self.boundary} is < 0")
        require(
            (self.distance == "lpips") == (self.lpips is not None),
            "lpips: distance lpips needs the file of its weights, and no other distance takes one",
        )
        require(
            not (isinstance(self.pairs, RatioPairs) and self.path != "noise"),
            f"path: {self.path} has no meaning with ratio pairs (r may be 0); use noise",
        )
        require(
            not (
                isinstance(self.pairs, RatioPairs)
                and isinstance(self.target, TargetEMA)
                and self.target.adaptive_s0 > 0
            ),
            "target.adaptive_s0: needs an N(k), which ratio pairs do not have",
        )
        require(
            self.guidance == 1 or self.path != "noise",
            f"guidance: {self.guidance} guides the teacher's path, path noise has no teacher",
        )

    @property
    def uses_teacher(self) -> bool:
        """Whether it begins with, or asks, another model."""
        return self.init != "scratch" or self.path != "noise"


@dataclass(frozen=True, kw_only=True)
class SCMConfig(AdoptableConfig):
    """The continuous-time loss in TrigFlow (Lu and Song 2024): sCD with a teacher, sCT without."""

    kind: Literal["scm"] = "scm"
    method: str
    init: Init
    path: Literal["teacher", "noise"]  # dx_t/dt from the teacher (sCD), or from the sample (sCT)
    P_mean: float = -1.0  # ln sigma ~ N(P_mean, P_std^2)
    P_std: float = 1.4
    tangent: Literal["normalize", "clip"] = "normalize"  # g / (|g| + tangent_c), or to [-1, 1]
    tangent_c: float = 0.1
    tangent_norm: Literal["l2", "rms"] = "l2"  # over the sample; rms = l2 / sqrt(dim)
    tangent_warmup_images: int = 0
    adaptive_weight: bool = True
    # The paper's prior weight 1 / sigma is in g already (see scm_tangent); inverse_sigma multiplies
    # the loss by it once more. The learned weight undoes that, but slowly: short runs take uniform.
    prior_weight: Literal["uniform", "inverse_sigma"] = "uniform"
    guidance: float = 1.0  # of the teacher; 1 is none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.P_std > 0, f"P_std: {self.P_std} must be > 0")
        require(self.tangent_c > 0, f"tangent_c: {self.tangent_c} must be > 0")
        require(
            self.tangent_warmup_images >= 0,
            f"tangent_warmup_images: {self.tangent_warmup_images} must be >= 0",
        )
        require(
            self.guidance == 1 or self.path == "teacher",
            f"guidance: {self.guidance} guides the teacher, path noise has none",
        )

    @property
    def uses_teacher(self) -> bool:
        """Whether it begins with, or asks, another model."""
        return self.init != "scratch" or self.path == "teacher"


@dataclass(frozen=True, kw_only=True)
class SharedTimes:
    """Two draws of sigmoid(N(P_mean, P_std^2)); t is the larger, r the smaller (MeanFlow)."""

    kind: Literal["shared"] = "shared"
    P_mean: float = -0.4
    P_std: float = 1.0

    def __post_init__(self) -> None:
        require(self.P_std > 0, f"P_std: {self.P_std} must be > 0")


@dataclass(frozen=True, kw_only=True)
class SeparateTimes:
    """t ~ sigmoid(N(t_mean, t_std^2)) and r from a law of its own, brought into order."""

    kind: Literal["separate"] = "separate"
    t_mean: float = -0.6
    t_std: float = 1.6
    r_mean: float = -4.0
    r_std: float = 1.6

    def __post_init__(self) -> None:
        require(self.t_std > 0, f"t_std: {self.t_std} must be > 0")
        require(self.r_std > 0, f"r_std: {self.r_std} must be > 0")


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig(AdoptableConfig):
    """MeanFlow (Geng et al. 2025): average velocity u(z, t, r) between two times, no teacher."""

    kind: Literal["mean_flow"] = "mean_flow"
    method: str
    init: Literal["scratch"] = "scratch"
    path: Literal["noise"] = "noise"
    times: SharedTimes | SeparateTimes = SeparateTimes()
    apart: float = 0.75  # share of samples with r < t; the others have r = t
    power: float = 0.75  # p of the loss |.|^2 / stopgrad(|.|^2 + c)^p
    power_c: float = 1e-3
    # Guidance inside training (its Eq. 20): w v + (1 - w - kappa) u(null) + kappa u(class).
    guidance: float = 1.0
    kappa: float = 0.0
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("apart", self.apart)
        require(self.power >= 0, f"power: {self.power} must be >= 0")
        require(self.power_c > 0, f"power_c: {self.power_c} must be > 0")
        require(0 <= self.kappa < 1, f"kappa: {self.kappa} must be in [0, 1)")
        require_share("label_dropout", self.label_dropout)
        guided = self.guidance != 1 or self.kappa != 0
        require(
            not guided or self.label_dropout > 0,
            "label_dropout: guidance needs a null class to learn, set it to 0.1",
        )

    @property
    def uses_teacher(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class TruncateConfig(TrainConfig):
    """TCM's second stage (Lee et al. 2024): a student of sigma >= sigma_prime, a frozen first stage
    below. t follows a truncated Student-t law of ln t; a share of the batch sits at sigma_prime."""

    method: str
    of: Literal["isolate", "distill"] = "isolate"  # the first stage, which stands for the teacher
    init: Literal["teacher"] = "teacher"
    path: Literal["teacher"] = "teacher"
    sigma_prime: float = 1.0
    nu: float = 0.01  # degrees of freedom, location and scale of the law of ln t
    loc: float = 0.0
    scale: float = 0.2
    q: float = 2.0  # r(t) as in the last stage of ECT
    stage: int = 7
    k: float = 8.0
    b: float = 1.0
    max_ratio: float | None = None
    distance: Literal["squared_l2", "pseudo_huber"] = "pseudo_huber"
    huber_c: float | None = 1e-8
    weight: Literal["uniform", "inverse_gap", "edm"] = "inverse_gap"
    boundary: float | None = None  # as of the discrete family
    boundary_share: float = 0.25
    boundary_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sigma_prime > 0, f"sigma_prime: {self.sigma_prime} must be > 0")
        require(self.nu > 0, f"nu: {self.nu} must be > 0")
        require(self.scale > 0, f"scale: {self.scale} must be > 0")
        require(self.q > 1, f"q: {self.q} must be > 1")
        require(self.stage >= 0, f"stage: {self.stage} must be >= 0")
        require(self.k >= 0, f"k: {self.k} must be >= 0")
        require(
            self.max_ratio is None or 0 < self.max_ratio < 1,
            f"max_ratio: {self.max_ratio} must be in (0, 1)",
        )
        require(self.huber_c is None or self.huber_c >= 0, f"huber_c: {self.huber_c} must be >= 0")
        require_share("boundary_share", self.boundary_share)
        require(
            0 < round(self.boundary_share * self.batch) < self.batch,
            f"boundary_share: {self.boundary_share} of a batch of {self.batch} is none or all",
        )
        require(self.boundary_weight > 0, f"boundary_weight: {self.boundary_weight} must be > 0")

    @property
    def uses_teacher(self) -> bool:
        return True


IsolateConfig = ConsistencyConfig | SCMConfig | MeanFlowConfig
DistillConfig = ConsistencyConfig | SCMConfig
StageTraining = TeacherConfig | ConsistencyConfig | SCMConfig | MeanFlowConfig | TruncateConfig
