"""What a sweep searches and how: `configs/sweeps/*.yaml` as frozen values.

Standard library only. Every class validates itself: ValueError that begins with the field.
"""

import re
from dataclasses import dataclass
from typing import Literal

from consistency.config import require

StageName = Literal["isolate", "distill"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One dotted key of the recipe and the values it may take: `choice`, or `range`.

    `when`: conditions on axes before it, `key=value` or `key=value|value`; where one does not hold,
    the axis is not active and the recipe keeps its own value.
    """

    key: str
    choice: tuple[str, ...] = ()  # as written behind `key=`
    range: tuple[float, float] | None = None
    log: bool = False  # the range is drawn uniformly in its logarithm
    integer: bool = False
    when: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"\w+(\.\w+)+", self.key) is not None,
            f"key: {self.key!r} is no dotted key of a recipe, such as isolate.pairs.levels.s1",
        )
        require(
            (self.range is None) != (len(self.choice) == 0),
            f"choice: {self.key} takes a choice of values or a range, one of the two",
        )
        require(
            len(set(self.choice)) == len(self.choice), f"choice: {self.key} names a value twice"
        )
        require(
            self.range is None or self.range[0] < self.range[1],
            f"key: {self.key}'s range must go from low to high",
        )
        require(
            not self.log or (self.range is not None and self.range[0] > 0),
            f"log: {self.key} needs a range above 0",
        )
        require(
            not self.integer
            or (self.range is not None and all(end == int(end) for end in self.range)),
            f"integer: {self.key} needs a range between whole numbers",
        )

        for text in self.when:
            key, _, values = text.partition("=")
            require(
                key.strip() != "" and all(value.strip() for value in values.split("|")),
                f"when: {text!r} is no condition, such as isolate.method=ict|ct-2023",
            )

    def conditions(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """(key, values) that must hold, each."""
        pairs = (text.partition("=") for text in self.when)
        return tuple(
            (key.strip(), tuple(value.strip() for value in values.split("|")))
            for key, _, values in pairs
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search over one stage's settings, for one stage of a recipe."""

    name: str
    stage: StageName
    space: tuple[Axis, ...]
    fixed: tuple[str, ...] = ()  # overrides of every trial, `key=value`; sampling EMAs belong here

    # How far and how many.
    trials: int = 16
    minutes: float | None = None  # of wall clock over all attempts; None: no limit
    budget: float = 1.0  # of the stage's images, per trial; N(k) and mu(k) shrink with it

    # Who proposes, who stops.
    search: Literal["tpe", "random"] = "tpe"
    startup: int = 8  # trials before TPE has something to go by
    scheduler: Literal["asha", "median", "pbt", "none"] = "asha"
    probes: int = 9  # looks at a trial, at equal parts of its schedule
    grace: int = 1  # probes before a trial may be stopped
    eta: int = 3  # ASHA lets one in `eta` pass each rung, rungs are `eta` apart
    seed: int = 0

    # What is measured in a trial, on its EMA weights with common noise.
    steps: Literal[1, 2] = 2  # the column trials are ranked by; the other is recorded too
    samples: int = 500
    noise_seed: int = 3  # other noise than evaluate's: it chooses, evaluate judges

    # The best are measured again before one is named.
    finalists: int = 3
    finalist_samples: int = 2_000  # per seed block
    finalist_blocks: int = 3
    finalist_seed: int = 4
    allow_rank_deficient: bool = False

    def images(self, whole: int) -> int:
        """A trial's budget, of a stage of `whole` images."""
        return int(whole * self.budget)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name) is not None,
            f"name: {self.name!r} may hold letters, digits, '-' and '_'",
        )
        require(len(self.space) > 0, "space: has no axis")
        require(self.trials >= 1, f"trials: {self.trials} must be >= 1")
        require(self.minutes is None or self.minutes > 0, f"minutes: {self.minutes} must be > 0")
        require(0 < self.budget <= 1, f"budget: {self.budget} must be in (0, 1]")
        require(self.startup >= 1, f"startup: {self.startup} must be >= 1")
        require(self.probes >= 1, f"probes: {self.probes} must be >= 1")
        require(1 <= self.grace <= self.probes, f"grace: {self.grace} must lie in 1..probes")
        require(self.eta >= 2, f"eta: {self.eta} must be >= 2")
        require(self.seed >= 0, f"seed: {self.seed} must be >= 0")
        require(self.samples > 1, f"samples: {self.samples} must be > 1")
        require(self.finalists >= 1, f"finalists: {self.finalists} must be >= 1")
        require(self.finalist_samples > 1, f"finalist_samples: {self.finalist_samples} must be > 1")
        require(self.finalist_blocks >= 1, f"finalist_blocks: {self.finalist_blocks} must be >= 1")
