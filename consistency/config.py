"""What is trained, as frozen values. Standard library only, so a plan can be printed without torch.

Every class validates itself: ValueError whose text begins with the offending field. The `kind`
field tells the members of a union apart (in YAML too). Symbols as in the package docstring.
"""

import math
from dataclasses import dataclass
from typing import Literal


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise axis shared by every stage: Karras et al. 2022 (EDM), Table 1; CM Appendix C."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def __post_init__(self) -> None:
        require(self.sigma_min > 0, f"sigma_min: {self.sigma_min} must be > 0")
        require(
            self.sigma_min < self.sigma_max,
            f"sigma_min: {self.sigma_min} must be < sigma_max ({self.sigma_max})",
        )
        require(self.sigma_data > 0, f"sigma_data: {self.sigma_data} must be > 0")
        require(self.rho > 0, f"rho: {self.rho} must be > 0")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """EDM's DDPM++ U-Net; the defaults are its CIFAR-10 size (55.7 M parameters)."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention: tuple[int, ...] = (16,)  # resolutions with self-attention
    class_conditional: bool = False

    def __post_init__(self) -> None:
        require(
            self.channels >= 4 and self.channels % 2 == 0,
            f"channels: {self.channels} must be even and >= 4",
        )
        require(
            len(self.channel_mult) > 0 and min(self.channel_mult) >= 1,
            f"channel_mult: {list(self.channel_mult)} needs at least one level, each >= 1",
        )
        require(self.num_blocks >= 1, f"num_blocks: {self.num_blocks} must be >= 1")
        require(
            all(side >= 1 for side in self.attention),
            f"attention: {list(self.attention)} must hold sides in pixels, each >= 1",
        )
        for width in sorted(self._widths()):
            groups = norm_groups(width)
            require(
                width % groups == 0,
                f"channels: {self.channels} makes a layer of {width} channels, which does not "
                f"divide into {groups} groups; take a multiple of 32",
            )

    def _widths(self) -> set[int]:
        """Channels of every normalised layer, the decoder's concatenations with skips included."""
        c = self.channels
        widths, skips = {c}, [c]
        for level, mult in enumerate(self.channel_mult):
            skips += [c] if level else []  # the halving layer
            c = self.channels * mult
            skips += [c] * self.num_blocks
            widths.add(c)
        for mult in reversed(self.channel_mult):
            for _ in range(self.num_blocks + 1):
                widths.add(c + skips.pop())
                c = self.channels * mult
        return widths


def norm_groups(width: int) -> int:
    """Groups of a GroupNorm: at least 4 channels in each, at most 32 groups (EDM)."""
    return min(32, width // 4)


def check_network(network: NetworkConfig, size: int) -> None:
    """Whether a network fits square images of `size` pixels; ValueError naming the field if not."""
    halvings = len(network.channel_mult) - 1
    require(
        size >= 2**halvings and size % 2**halvings == 0,
        f"channel_mult: {list(network.channel_mult)} halves the image {halvings} times, but "
        f"{size} pixels are not divisible by {2**halvings}",
    )
    reached = [size >> level for level in range(halvings + 1)]
    missed = sorted(set(network.attention) - set(reached))
    require(
        not missed, f"attention: {missed} is never reached, only {reached} are (of {size} pixels)"
    )


# --- sampling EMAs (what is evaluated and published; not the target network) -------------------


@dataclass(frozen=True, kw_only=True)
class ConstantEMA:
    """beta per optimiser step."""

    kind: Literal["constant"] = "constant"
    beta: float = 0.9999

    def __post_init__(self) -> None:
        require(0 <= self.beta < 1, f"beta: {self.beta} must be in [0, 1)")

    @property
    def name(self) -> str:
        return f"constant-{self.beta:g}"


@dataclass(frozen=True, kw_only=True)
class HalfLifeEMA:
    """beta = 0.5^(batch / min(images, ramp * images_seen)), EDM's rule."""

    kind: Literal["half_life"] = "half_life"
    images: int = 500_000
    ramp: float = 0.05

    def __post_init__(self) -> None:
        require(self.images > 0, f"images: {self.images} must be > 0")
        require(self.ramp > 0, f"ramp: {self.ramp} must be > 0")

    @property
    def name(self) -> str:
        return f"half_life-{self.images}"


@dataclass(frozen=True, kw_only=True)
class PowerEMA:
    """beta_k = (1 - 1/k)^(gamma + 1), gamma given by its relative width sigma_rel (EDM2)."""

    kind: Literal["power"] = "power"
    sigma_rel: float = 0.10

    def __post_init__(self) -> None:
        require(
            0 < self.sigma_rel < 0.28,
            f"sigma_rel: {self.sigma_rel} must be in (0, 0.28) (0.289 is gamma = 0)",
        )

    @property
    def name(self) -> str:
        return f"power-{self.sigma_rel:g}"


EMAConfig = ConstantEMA | HalfLifeEMA | PowerEMA


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

    def __post_init__(self) -> None:
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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training stage shares. The unit of progress is images seen, over all workers."""

    images: int  # the budget
    batch: int = 512  # global, whatever the number of workers
    optimizer: Literal["adam", "radam"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_images: int = 0
    decay_from: float = 1.0  # fraction of the budget where a linear decay to zero begins
    grad_clip: float = 0.0  # global norm; 0 means none
    dropout: float = 0.0
    flip: bool = False  # random horizontal flips
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: tuple[EMAConfig, ...] = (ConstantEMA(),)  # the first one is evaluated and published

    def __post_init__(self) -> None:
        require(self.images > 0, f"images: {self.images} must be > 0")
        require(self.batch > 0, f"batch: {self.batch} must be > 0")
        require(
            self.images >= self.batch,
            f"images: {self.images} is less than one batch ({self.batch})",
        )
        require(self.lr > 0 and math.isfinite(self.lr), f"lr: {self.lr} must be > 0")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas: {self.betas} must be in [0, 1)")
        require(self.warmup_images >= 0, f"warmup_images: {self.warmup_images} must be >= 0")
        require(0 <= self.decay_from <= 1, f"decay_from: {self.decay_from} must be in [0, 1]")
        require(self.grad_clip >= 0, f"grad_clip: {self.grad_clip} must be >= 0")
        require(0 <= self.dropout < 1, f"dropout: {self.dropout} must be in [0, 1)")
        require(len(self.ema) > 0, "ema: needs at least one entry, it is what gets published")
        names = [ema.name for ema in self.ema]
        require(len(set(names)) == len(names), f"ema: {names} has two of the same kind")

    @property
    def steps(self) -> int:
        """Optimiser steps: the budget rounded up to whole batches."""
        return math.ceil(self.images / self.batch)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(TrainConfig):
    """EDM denoising: ln sigma ~ N(P_mean, P_std^2)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.P_std > 0, f"P_std: {self.P_std} must be > 0")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(TrainConfig):
    """One composition of parts: pairs x path x distance x weight x target.

    `method` is the name of the preset in `configs/methods/` that filled the keys left unsaid.
    """

    method: str
    init: Literal["scratch", "teacher"]
    pairs: PairsConfig
    path: Literal["heun", "euler", "noise"]  # teacher ODE step, or the same noise (CT)
    distance: Literal["l1", "squared_l2", "pseudo_huber"] = "pseudo_huber"
    huber_c: float | None = None  # None: 0.00054 sqrt(dim), iCT
    weight: Literal["uniform", "inverse_gap"] = "uniform"
    target: TargetConfig = StopGradTarget()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.huber_c is None or self.huber_c >= 0, f"huber_c: {self.huber_c} must be >= 0")
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

    @property
    def uses_teacher(self) -> bool:
        return self.init == "teacher" or self.path != "noise"
