"""Noise axis, network and sampling EMAs as frozen values; the methods are in `method_config`.

Standard library only, so a plan can be printed without torch. Every class validates itself:
ValueError whose text begins with the offending field. The `kind` field tells the members of a
union apart (in YAML too). Symbols as in the package docstring.
"""

import math
from dataclasses import dataclass, field
from typing import Literal


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_share(name: str, share: float) -> None:
    require(0 <= share < 1, f"{name}: {share} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise axis shared by every stage: Karras et al. 2022 (EDM), Table 1; CM Appendix C."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    # What the network is told of sigma: ln(sigma) / 4 (EDM), or the angle atan(sigma / sigma_data)
    # (TrigFlow, made for sCM), or 1000 ln(sigma) / 4 (the checkpoints of Song et al. 2023, and
    # diffusers). One network cannot be used under another convention.
    c_noise: Literal["log_sigma", "log_sigma_1000", "angle"] = "log_sigma"

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
    """A U-Net of Karras et al. 2022, Table 7; the defaults are DDPM++ for CIFAR-10 (55.7 M)."""

    architecture: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention: tuple[int, ...] = (16,)  # resolutions with self-attention
    class_conditional: bool = False
    # How the embedding enters a block: added; as scale and shift of the norm (AdaGN); the same with
    # both pixel-normalised (sCM, section 4.1). None: what the architecture was published with.
    adagn: Literal["shift", "scale_shift", "double_norm"] | None = None
    head_channels: int | None = None  # width of an attention head; None: 64 for adm, else one head
    fourier_scale: float = 16.0  # ncsnpp: std of its random frequencies (0.02 for iCT and sCM)
    groups: int | None = None  # of every group norm; None: EDM's, see `norm_groups`

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
        # Descriptions come from outside too: one line must not ask for a million layers.
        require(self.num_blocks <= 256, f"num_blocks: {self.num_blocks} must be <= 256")
        require(self.fourier_scale > 0, f"fourier_scale: {self.fourier_scale} must be > 0")
        require(self.groups is None or self.groups >= 1, f"groups: {self.groups} must be >= 1")
        require(
            self.head_channels is None or self.head_channels >= 1,
            f"head_channels: {self.head_channels} must be >= 1",
        )
        require(
            all(side >= 1 for side in self.attention),
            f"attention: {list(self.attention)} must hold sides in pixels, each >= 1",
        )
        for width in sorted(self._widths()):
            groups = norm_groups(width, self.groups)
            require(
                width % groups == 0,
                f"channels: {self.channels} makes a layer of {width} channels, which does not "
                f"divide into {groups} groups; take a multiple of {max(32, groups)}",
            )

    def heads(self, width: int) -> int:
        """Attention heads of a layer of `width` channels: one where it is narrower than a head."""
        wanted = self.head_channels or (64 if self.architecture == "adm" else width)
        heads = max(1, width // wanted)
        # ADM's own 64 gives way (96 channels: one head of 96); a width asked for is exact.
        divisor = heads if self.head_channels is None else min(wanted, width)
        require(
            width % divisor == 0,
            f"head_channels: {wanted} does not divide the {width} channels of an attention layer",
        )
        return heads

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


def norm_groups(width: int, groups: int | None = None) -> int:
    """Groups of a GroupNorm: those asked for, or EDM's (at least 4 channels each, at most 32)."""
    return min(32, width // 4) if groups is None else groups


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
    for side, mult in zip(reached, network.channel_mult, strict=True):
        if side in network.attention or side == reached[-1]:  # the lowest one always attends
            network.heads(network.channels * mult)


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


@dataclass(frozen=True, kw_only=True)
class ChurnConfig:
    """Fresh noise in Heun's sampler: S_churn, S_min, S_max, S_noise of Algorithm 2, EDM."""

    S_churn: float
    S_min: float = 0.0
    S_max: float | None = None  # None: no upper level
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        require(self.S_churn > 0, f"S_churn: {self.S_churn} must be > 0")
        require(self.S_min >= 0, f"S_min: {self.S_min} must be >= 0")
        require(
            self.S_max is None or self.S_max > self.S_min,
            f"S_max: {self.S_max} must be > S_min ({self.S_min})",
        )
        require(self.S_noise > 0, f"S_noise: {self.S_noise} must be > 0")

    def arguments(self) -> dict[str, float]:
        """Keyword arguments of `sampling.sample_heun`."""
        return {
            "S_churn": self.S_churn,
            "S_min": self.S_min,
            "S_max": math.inf if self.S_max is None else self.S_max,
            "S_noise": self.S_noise,
        }


# --- training: what every stage shares, and the teacher -------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What every training stage shares. The unit of progress is images seen, over all workers."""

    images: int  # the budget
    batch: int = 512  # global, whatever the number of workers
    optimizer: Literal["adam", "radam"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8  # of the optimiser
    warmup_images: int = 0
    inverse_sqrt_images: int = 0  # lr falls as 1 / sqrt(images / this) after so many; 0 means never
    decay_from: float = 1.0  # fraction of the budget where a linear decay to zero begins
    grad_clip: float = 0.0  # global norm; 0 means none
    dropout: float = 0.0
    dropout_max_side: int | None = None  # dropout only at resolutions up to this; None: everywhere
    flip: bool = False  # random horizontal flips
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network's inside; masters are fp32
    ema: tuple[EMAConfig, ...] = (ConstantEMA(),)  # the first one is evaluated and published
    snapshots: int = 0  # of the power EMAs, evenly spread: any EMA length can be rebuilt from them

    def __post_init__(self) -> None:
        require(self.images > 0, f"images: {self.images} must be > 0")
        require(self.batch > 0, f"batch: {self.batch} must be > 0")
        require(
            self.images >= self.batch,
            f"images: {self.images} is less than one batch ({self.batch})",
        )
        require(self.lr > 0 and math.isfinite(self.lr), f"lr: {self.lr} must be > 0")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas: {self.betas} must be in [0, 1)")
        require(self.eps > 0, f"eps: {self.eps} must be > 0")
        require(self.warmup_images >= 0, f"warmup_images: {self.warmup_images} must be >= 0")
        require(
            self.inverse_sqrt_images >= 0,
            f"inverse_sqrt_images: {self.inverse_sqrt_images} must be >= 0",
        )
        require(0 <= self.decay_from <= 1, f"decay_from: {self.decay_from} must be in [0, 1]")
        require(self.grad_clip >= 0, f"grad_clip: {self.grad_clip} must be >= 0")
        require(0 <= self.dropout < 1, f"dropout: {self.dropout} must be in [0, 1)")
        require(
            self.dropout_max_side is None or self.dropout_max_side >= 1,
            f"dropout_max_side: {self.dropout_max_side} must be >= 1 (pixels)",
        )
        require(len(self.ema) > 0, "ema: needs at least one entry, it is what gets published")
        names = [ema.name for ema in self.ema]
        require(len(set(names)) == len(names), f"ema: {names} has two of the same kind")
        require(self.snapshots >= 0, f"snapshots: {self.snapshots} must be >= 0")
        require(
            self.snapshots <= self.steps,
            f"snapshots: {self.snapshots} are more than the {self.steps} steps",
        )
        require(
            self.snapshots == 0 or sum(isinstance(ema, PowerEMA) for ema in self.ema) >= 2,
            "snapshots: need two power EMAs to rebuild others from, such as "
            "ema=[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.10}]",
        )

    @property
    def steps(self) -> int:
        """Optimiser steps: the budget rounded up to whole batches."""
        return math.ceil(self.images / self.batch)


@dataclass(frozen=True, kw_only=True)
class AdoptableConfig(TrainConfig):
    """A stage whose model may come from outside: then nothing is trained, and the rest of its keys
    means nothing."""

    # Folder, file or fsspec URL; written `from`, a word that Python keeps for itself. Where it lies
    # is no identity, what it holds is (pipelines/adopting.py).
    from_: str | None = field(default=None, metadata={"key": "from", "identity": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.from_ != "", "from: is empty; name a model's folder or file, or leave it out")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(AdoptableConfig):
    """EDM denoising: ln sigma ~ N(P_mean, P_std^2).

    With `noise.c_noise: angle` it trains a TrigFlow model: the two losses are the same function.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    label_dropout: float = 0.0  # share of images whose class is hidden, for guidance (Ho 2022)
    adaptive_weight: bool = False  # loss / exp(u) + u with a learned u(sigma) (Eq. 21, EDM2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.P_std > 0, f"P_std: {self.P_std} must be > 0")
        require_share("label_dropout", self.label_dropout)
