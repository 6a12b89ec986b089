"""The gate: may a model version take the alias? A pure decision over recorded numbers.

It rests on a Frechet distance d over seed blocks, candidate minus champion, and on the margin

    max(2 * sqrt((var_candidate + var_champion) / 2), 1 % of the champion's mean),

variances over the blocks divided by n - 1. Below -margin the candidate wins, above it is refused.
Within it only a secondary measure can tell them apart. Numbers of two protocols never compare, and
what is not known is never a pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

Outcome = Literal["champion", "challenger", "refused", "no decision"]

FLOOR = 0.01  # of the champion's mean: the least margin
# Shares of images: they count as different beyond an absolute step, all else beyond 1 %.
SHARES = frozenset({"recall", "precision", "density", "coverage"})
SHARE_STEP = 0.02
HIGHER_IS_BETTER = SHARES | {"inception_score"}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What an evaluation found."""

    name: str  # the metric with its n: "fid50k", "fd_domain_2k"
    unit: str  # "%" or ""
    values: tuple[float, ...]  # one per seed block, lower is better; () when not recorded
    protocol: Mapping[str, Any]  # flat, JSON scalars, with "seed_blocks"; equal is comparable
    secondary: Mapping[str, float]  # "kid", "recall", "evaluations", ...: what was measured

    @property
    def is_proxy(self) -> bool:
        """Everything but FID, whose name only the verified network gets."""
        return not self.name.startswith("fid")

    def text(self, value: float) -> str:
        """A value with its unit."""
        if not self.unit:
            return f"{value:.4g}"
        small = 0 < abs(value) < 0.1
        return f"{value:.2g} {self.unit}" if small else f"{value:.2f} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Standing(Measurement):
    """What is known of a version."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the recipe demands."""

    max_distance: float | None  # in the metric's unit; None: no absolute bound
    allow_proxy: bool  # may a metric that is not FID decide?


@dataclass(frozen=True)
class Decision:
    """What and why, in one sentence. "champion": the version holds the alias from now on."""

    outcome: Outcome
    reason: str


def decide(
    candidate: Standing, champion: Standing | None, rule: Rule, *, model: str, alias: str
) -> Decision:
    """The decision about `candidate`, given who holds `alias` of `model`.

    The gate gives the alias and never takes it away without a successor: a champion that was
    evaluated anew keeps it, and the reason says when it would not have been given.
    """
    me, by = f"version {candidate.version}", " by a proxy" if candidate.is_proxy else ""
    obstacle = _obstacle(candidate, rule)
    if champion is not None and champion.version == candidate.version:
        if obstacle is not None:
            still = f"{me} is still {alias}, which nothing replaces, although {obstacle.reason}"
            return Decision("champion", still)
        return Decision("champion", f"{me} already is {alias}{by} ({_mean(candidate)})")
    if obstacle is not None:
        head = f"{me} is refused{by}" if obstacle.outcome == "refused" else f"no decision on {me}"
        return Decision(obstacle.outcome, f"{head}: {obstacle.reason}")
    if champion is None:
        return Decision("champion", f"{me} is {alias}{by}: the first one ({_mean(candidate)})")
    if gap := _gap(candidate, champion):
        mend = (
            f"register version {champion.version} again under this recipe, or compare with: "
            f"cmforge compare models:/{model}@{alias} models:/{model}/{candidate.version}"
        )
        head = f"no decision on {me}, version {champion.version} stays {alias}"
        return Decision("no decision", f"{head}: {gap}; {mend}")
    outcome, found = _compare(candidate, champion)
    rank = {"champion": alias, "challenger": "a challenger"}.get(outcome, outcome)
    return Decision(outcome, f"{me} is {rank}{by}: {found}")


def margin_of(candidate: Measurement, champion: Measurement) -> float:
    """What the difference of two means must exceed to count."""
    floor = FLOOR * abs(mean(champion.values))
    if len(candidate.values) == 1:
        return floor
    pooled = math.hypot(stdev(candidate.values), stdev(champion.values)) / math.sqrt(2)
    return max(2 * pooled, floor)


def differences(one: Measurement, other: Measurement) -> list[str]:
    """ "samples: 2000 and 50000" for each field that differs; empty when comparable."""
    left, right = ({"metric": m.name, "unit": m.unit or "none", **m.protocol} for m in (one, other))
    return [
        f"{key}: {_short(left.get(key, 'unknown'))} and {_short(right.get(key, 'unknown'))}"
        for key in {**left, **right}
        if key not in left or key not in right or left[key] != right[key]
    ]


def _obstacle(candidate: Standing, rule: Rule) -> Decision | None:
    """Why the candidate cannot win whatever it is compared with."""
    blocks = candidate.protocol["seed_blocks"]
    if len(candidate.values) != blocks:
        return Decision("refused", f"{len(candidate.values)} of {blocks} seed blocks have a value")
    if not all(map(math.isfinite, candidate.values)):
        return Decision("refused", "its distance is not finite")
    for key, value in candidate.secondary.items():
        if not math.isfinite(value):
            return Decision("refused", f"its {key} is not finite")
    if rule.max_distance is not None and mean(candidate.values) > rule.max_distance:
        bound = f"{rule.max_distance:g} {candidate.unit}".strip()
        return Decision("refused", f"{_mean(candidate)} is above max_distance {bound}")
    if candidate.is_proxy and not rule.allow_proxy:
        reason = "a proxy does not gate unless register.allow_proxy is true"
        return Decision("no decision", f"{_mean(candidate)}, and {reason}")
    return None


def _gap(candidate: Standing, champion: Standing) -> str | None:
    """Why the champion's record does not allow a comparison."""
    if not champion.values or not champion.protocol:
        return "it has no recorded values to compare with"
    if different := differences(candidate, champion):
        pair = f"{candidate.version} and {champion.version}"
        return f"versions {pair} are measured differently ({', '.join(different)})"
    if len(champion.values) != champion.protocol["seed_blocks"]:
        blocks = champion.protocol["seed_blocks"]
        return f"it has a value of {len(champion.values)} of {blocks} seed blocks"
    if not all(map(math.isfinite, champion.values)):
        return "its distance is not finite"
    return None


def _compare(candidate: Standing, champion: Standing) -> tuple[Outcome, str]:
    """Two complete records of one protocol: the outcome, and the numbers in words."""
    mine, theirs = mean(candidate.values), mean(champion.values)
    d, margin = mine - theirs, margin_of(candidate, champion)
    note = ""
    if len(candidate.values) == 1:
        note = f" (1 % of version {champion.version}'s; the spread of one seed block is unknown)"
    text = candidate.text
    limit = f"the margin of {text(margin)}{note}"
    his = f"{text(theirs)} of version {champion.version}"
    better, worse = _secondary(candidate, champion)
    if d > margin:
        return "refused", f"{_mean(candidate)} is worse than {his} by {text(d)}, more than {limit}"
    if d < -margin:
        found = f"{_mean(candidate)} beats {his} by {text(-d)}, more than {limit}"
        if "recall" in worse:  # quality bought with diversity
            return "challenger", f"{found}, but {worse['recall']}"
        return "champion", found
    found = f"{_mean(candidate)} and {his} differ by {text(abs(d))}, within {limit}"
    if better and not worse:
        gained = " and ".join(better.values())
        return "champion", f"{found}, but {gained}, and nothing secondary is worse"
    tie = " and ".join(worse.values()) or "nothing secondary is better"
    return "challenger", f"{found}, and {tie}"


def _secondary(candidate: Standing, champion: Standing) -> tuple[dict[str, str], dict[str, str]]:
    """What is better and what is worse, of all that is known of both; and a recall kept back.

    The step that counts is the same seen from either side: of two versions that tie, one at most
    beats the other. `kid_std` is no measure but the least step of `kid`; `_r2` says how good a fit
    was.
    """
    better, worse = {}, {}
    for key, theirs in champion.secondary.items():
        if key.endswith(("_std", "_r2")):
            continue
        mine = candidate.secondary.get(key)
        if not math.isfinite(theirs) or (mine is None and key != "recall"):
            continue
        if mine is None:
            worse[key] = f"its {key} is unknown, that of version {champion.version} is {theirs:.4g}"
            continue
        step = SHARE_STEP if key in SHARES else FLOOR * max(abs(mine), abs(theirs))
        spreads = (side.secondary.get(f"{key}_std", 0.0) for side in (candidate, champion))
        step = max(step, *spreads)
        gain = mine - theirs if key in HIGHER_IS_BETTER else theirs - mine
        if gain > step:
            better[key] = f"its {key} {mine:.4g} is better than {theirs:.4g}"
        elif gain < -step:
            worse[key] = f"its {key} {mine:.4g} is worse than {theirs:.4g}"
    return better, worse


def _mean(standing: Standing) -> str:
    return f"{standing.name} {standing.text(mean(standing.values))}"


def _short(value: Any) -> str:
    """A digest by its first 12 digits."""
    text = str(value)
    return text if len(text) <= 32 else text[:12]
