"""A sweep's space: which settings it has, whether a recipe takes them, and which of them could
change while a model trains. Nothing here draws or trains."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from typing import Protocol

from infra.errors import UserError
from pipelines.config import RecipeSource
from pipelines.strict_yaml import did_you_mean
from pipelines.sweep import Axis, SweepConfig

MOST = 4_096  # combinations that a check builds
MOST_OF_A_VALUE = 256  # of a larger space, to find one in which a certain value is valid

Settings = tuple[str, ...]  # `key=value` of every active axis, in the space's order


class Draw(Protocol):
    """Who proposes values. `name` tells the axes apart, also those of one key."""

    def choose(self, name: str, choices: tuple[str, ...]) -> str: ...

    def number(self, name: str, axis: Axis) -> float | int: ...


@dataclass(frozen=True)
class Space:
    """Axes in their order; one is active where its conditions hold for active axes before it.

    only: (i, value) leaves the part in which axis i is active and has that value.
    """

    axes: tuple[Axis, ...]
    only: tuple[int, str] | None = None
    _sizes: dict[tuple[object, ...], int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """One per axis: its key, from a key's second axis on with a number (`isolate.init#2`)."""
        keys = [axis.key for axis in self.axes]
        nth = [keys[: at + 1].count(key) for at, key in enumerate(keys)]
        return tuple(f"{key}#{n}" if n > 1 else key for key, n in zip(keys, nth, strict=True))

    @property
    def has_ranges(self) -> bool:
        return any(axis.range is not None for axis in self.axes)

    def settings(self, draw: Draw) -> Settings:
        """One setting, asking `draw` for the value of every active axis."""
        active: dict[str, str] = {}
        for at, (axis, name) in enumerate(zip(self.axes, self.names, strict=True)):
            if not self._is_active(at, active):
                continue
            if axis.range is None:
                value = draw.choose(name, axis.choice)
                assert value in axis.choice, f"{name}: {value!r} was drawn"
            else:
                number = draw.number(name, axis)
                assert axis.range[0] <= number <= axis.range[1], f"{name}: {number} was drawn"
                value = as_text(axis, number)
            active[axis.key] = value
        return _texts(active)

    def values(self, at: int) -> tuple[str, ...]:
        """What axis `at` takes: its choices, or both ends of its range."""
        axis = self.axes[at]
        return axis.choice or tuple(as_text(axis, end) for end in axis.range or ())

    def holding(self, at: int, value: str) -> "Space":
        """The part of the space in which axis `at` is active and has the value."""
        return Space(self.axes, (at, value))

    def combinations(self) -> Iterator[Settings]:
        """Every combination of the choices, each range at its low end, in lexicographic order."""
        return (self.nth(index) for index in range(self.count()))

    def count(self) -> int:
        """How many `combinations` there are; they are not walked."""
        return self._size(0, {})

    def nth(self, index: int) -> Settings:
        """The combination at this place of `combinations`."""
        assert 0 <= index < self.count()
        active: dict[str, str] = {}
        for at, axis in enumerate(self.axes):
            if not self._is_active(at, active):
                continue
            for value in self._combined(at):
                size = self._size(at + 1, active | {axis.key: value})
                if index < size:
                    active[axis.key] = value
                    break
                index -= size
        return _texts(active)

    def spread(self, most: int) -> Iterator[Settings]:
        """All combinations or, of more than `most`, so many different ones from everywhere."""
        count = self.count()
        if count <= most:
            return self.combinations()
        # Prime to `count`, so that it meets every value of the last axes: another one, such as a
        # multiple of their number of values, would see the same one again and again.
        stride = count // most
        while gcd(stride, count) != 1:
            stride += 1
        return (self.nth(i * stride % count) for i in range(most))

    def _combined(self, at: int) -> tuple[str, ...]:
        if self.only is not None and self.only[0] == at:
            return self.only[1:]
        return self.values(at) if self.axes[at].choice else self.values(at)[:1]

    def _size(self, at: int, active: dict[str, str]) -> int:
        """Combinations of the axes from `at` on, given the values of those before."""
        if at == len(self.axes):
            return 1
        state = (at, *(active.get(key) for key in self._asked[at]))
        if state not in self._sizes:
            self._sizes[state] = self._size_anew(at, active)
        return self._sizes[state]

    def _size_anew(self, at: int, active: dict[str, str]) -> int:
        key = self.axes[at].key
        if not self._is_active(at, active):
            must = self.only is not None and self.only[0] == at
            return 0 if must else self._size(at + 1, active)
        if key in active:
            raise UserError(
                f"space[{at}] {key}: a second axis of this key is active beside one before it, for "
                f"instance where {', '.join(_texts(active))}; let their `when` exclude each other"
            )
        return sum(self._size(at + 1, active | {key: value}) for value in self._combined(at))

    @cached_property
    def _conditions(self) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], ...]:
        return tuple(axis.conditions() for axis in self.axes)

    @cached_property
    def _asked(self) -> tuple[tuple[str, ...], ...]:
        """Per axis, the keys of earlier ones that it or a later one looks at: all that matters."""
        asked: list[tuple[str, ...]] = []
        for at in range(len(self.axes)):
            before = {axis.key for axis in self.axes[:at]}
            keys = {axis.key for axis in self.axes[at:]}
            keys.update(key for pairs in self._conditions[at:] for key, _ in pairs)
            asked.append(tuple(sorted(before & keys)))
        return tuple(asked)

    def _is_active(self, at: int, active: dict[str, str]) -> bool:
        return all(active.get(key) in values for key, values in self._conditions[at])


def as_text(axis: Axis, number: float) -> str:
    """The shortest text from which a recipe reads the same number."""
    return str(int(number)) if axis.integer else repr(float(number))


def _texts(active: dict[str, str]) -> Settings:
    return tuple(f"{key}={value}" for key, value in active.items())


# --- is it a space of this recipe ----------------------------------------------------------------


@dataclass(frozen=True)
class Invalid:
    """A combination that is no recipe, and why. It is never started."""

    settings: Settings
    reason: str


@dataclass(frozen=True)
class Checked:
    """`looked_at` combinations were built: all, or of a large space MOST from everywhere."""

    valid: int
    looked_at: int
    invalid: tuple[Invalid, ...]


def check(sweep: SweepConfig, source: RecipeSource) -> Checked:
    """The space's combinations as settings of a recipe.

    UserError, a line for each mistake of the sweep: among them a value (or an end of a range) which
    is in no valid combination. Mistakes of the recipe itself come as they are.
    """
    source.recipe()
    looks = _Looks(source, sweep.fixed)
    mistakes = [*_mistakes_of_axes(sweep), *_mistakes_of_fixed(sweep)]
    if not mistakes:  # the first trial is the recipe's own setting
        mistakes = [f"fixed: {line}" for line in looks.objections(())]
    space = Space(sweep.space)
    if not mistakes:
        try:
            space.count()
        except UserError as error:
            mistakes = [str(error)]
    if not mistakes:
        looked = {settings: looks.objections(settings) for settings in space.spread(MOST)}
        invalid = tuple(Invalid(settings, lines[0]) for settings, lines in looked.items() if lines)
        mistakes = _mistakes_of_values(space, looks)
    if mistakes:
        raise UserError("\n".join(f"sweep {sweep.name}: {mistake}" for mistake in mistakes))
    return Checked(len(looked) - len(invalid), len(looked), invalid)


def _mistakes_of_axes(sweep: SweepConfig) -> list[str]:
    mistakes = []
    stage = sweep.stage
    for at, axis in enumerate(sweep.space):
        subject = f"space[{at}] {axis.key}"
        if not axis.key.startswith(f"{stage}."):
            mistakes.append(f"{subject}: trials train {stage} alone, so keys begin with {stage}.")
        elif axis.key == f"{stage}.images":
            mistakes.append(f"{subject}: the budget is no axis; set `budget`, a share of it")
        elif _is_below(axis.key, f"{stage}.ema", f"{stage}.snapshots"):
            mistakes.append(
                f"{subject}: the sampling EMA is no axis, it changes no training; name all of them "
                f"in fixed: '{stage}.ema=[...]', every trial scores each (or rebuild other lengths "
                f"afterwards: select_ema with {stage}.snapshots)"
            )
        for key, values in axis.conditions():
            earlier = [other for other in sweep.space[:at] if other.key == key]
            known = [value for other in earlier for value in other.choice]
            if not earlier:
                near = did_you_mean(key, [other.key for other in sweep.space[:at]])
                mistakes.append(f"{subject}: when: {key} is no axis before this one{near}")
            elif not known:
                mistakes.append(f"{subject}: when: {key} is a range; a condition names a choice")
            else:
                for value in values:
                    if value not in known:
                        listed = f"{did_you_mean(value, known)} (it has {', '.join(known)})"
                        mistakes.append(f"{subject}: when: {key} is never {value}{listed}")
    return mistakes


def _mistakes_of_fixed(sweep: SweepConfig) -> list[str]:
    mistakes = []
    for at, text in enumerate(sweep.fixed):
        subject = f"fixed[{at}] {text!r}"
        key, equals, _ = text.partition("=")
        if not equals:
            mistakes.append(f"{subject}: expected key=value, such as {sweep.stage}.dropout=0.1")
        elif not key.strip().startswith(f"{sweep.stage}."):
            mistakes.append(f"{subject}: trials train {sweep.stage} alone; keep to its keys")
        elif any(key.strip() == axis.key for axis in sweep.space):
            mistakes.append(f"{subject}: is an axis as well; take it out of fixed or of the space")
    return mistakes


class _Looks:
    """What the recipe objects to a setting; each setting is built once."""

    def __init__(self, source: RecipeSource, fixed: tuple[str, ...]) -> None:
        self.source, self.fixed = source, fixed
        self.known: dict[Settings, tuple[str, ...]] = {}

    def objections(self, settings: Settings) -> tuple[str, ...]:
        if settings not in self.known:
            self.known[settings] = self._objections(settings)
        return self.known[settings]

    def _objections(self, settings: Settings) -> tuple[str, ...]:
        try:
            self.source.recipe([*self.fixed, *settings])
        except UserError as error:
            own = [f"override {text!r}: " for text in (*self.fixed, *settings)]
            return tuple(_plainly(line, own) for line in str(error).splitlines())
        return ()


def _plainly(line: str, own: Sequence[str]) -> str:
    """`override 'a=1': a: why` as `a=1: why`, and any line without its place in a file."""
    for prefix in own:
        if line.startswith(prefix):
            said = prefix.removeprefix("override ")[1:-3]
            rest = line.removeprefix(prefix)
            return f"{said}: {rest.removeprefix(said.partition('=')[0] + ': ')}"
    return line if line.startswith("override ") else re.sub(r"^.*?:\d+:\d+: ", "", line)


def _mistakes_of_values(space: Space, looks: _Looks) -> list[str]:
    """A line for each cause by which some values are in no valid combination."""
    most = MOST if space.count() <= MOST else MOST_OF_A_VALUE
    mistakes: list[str] = []
    blamed: dict[tuple[int, str], list[tuple[str, ...]]] = {}  # what is said of each combination
    for at, axis in enumerate(space.axes):
        for value in space.values(at):
            part = space.holding(at, value)
            if part.count() == 0:
                mistakes.append(f"space[{at}] {axis.key}: is never active, mend its `when`")
                break
            said = []
            for settings in part.spread(most):
                said.append(looks.objections(settings))
                if not said[-1]:
                    break
            else:
                blamed[at, value] = said
    # What is said of all of a value's combinations is its cause, and that of all values which occur
    # only beside it. A value that is left then fails for several reasons, of which one is given.
    causes: dict[str, list[tuple[int, str]]] = {}
    for which, said in blamed.items():
        for line in said[0]:
            if all(line in lines for lines in said):
                causes.setdefault(line, []).append(which)
    for which, said in blamed.items():
        unexplained = [lines for lines in said if causes.keys().isdisjoint(lines)]
        if unexplained:
            causes.setdefault(unexplained[0][0], []).append(which)
    return mistakes + _grouped(space, causes)


def _grouped(space: Space, causes: dict[str, list[tuple[int, str]]]) -> list[str]:
    """One line for all values of an axis that one thing is wrong with."""
    groups: dict[tuple[int, str], list[str]] = {}
    for line, blamed in causes.items():
        texts = {(at, value): f"{space.axes[at].key}={value}: " for at, value in blamed}
        named = [which for which in blamed if line.startswith(texts[which])]
        first = (named or blamed)[0][0]  # else the first axis: those after it depend on it
        for at, value in named or blamed:
            if at == first:
                message = line.removeprefix(texts[at, value])
                if space.axes[at].range is not None and "expected an integer" in message:
                    message = "expected integers, set `integer: true`"
                groups.setdefault((at, message), []).append(value)
    return [
        f"space[{at}] {space.axes[at].key}={'|'.join(values)} is in no valid combination: "
        f"{message}; mend it, leave it out or narrow it with `when`"
        for (at, message), values in groups.items()
    ]


# --- population-based training -------------------------------------------------------------------

# Of a stage: what may change between two steps without making it another training.
CHANGEABLE = {
    *("lr", "grad_clip", "dropout", "huber_c", "tangent_c"),
    *("pairs.P_mean", "pairs.P_std", "P_mean", "P_std"),  # lognormal laws of sigma
}
# Why others may not, by the beginning of the key.
FIXED_FROM_THE_START = {
    "method": "another objective and networks",
    "kind": "another objective and networks",
    "init": "the weights a model begins with",
    "path": "another objective",
    "pairs.levels": "N(k) is a function of k/K from the start",
    "pairs.kind": "N(k) or r(t) is a function of k/K from the start",
    "pairs": "r(t) is a function of t and k/K from the start",
    "target": "theta- is an average from the start, with mu or mu(k), a function of k/K",
    "batch": "decides the number of steps K, of which N(k) and mu(k) are functions",
    "optimizer": "the optimiser's moments are kept from the start",
    "betas": "the optimiser's moments are kept from the start",
    "warmup_images": "a schedule over the whole run",
    "inverse_sqrt_images": "a schedule over the whole run",
    "decay_from": "a schedule over the whole run",
    "tangent_warmup_images": "a schedule over the whole run",
    "distance": "another loss",
    "weight": "another loss",
    "guidance": "another target distribution",
}


def explain_pbt(space: Space) -> tuple[str, ...]:
    """Why population-based training cannot search the space, a reason for each key that cannot
    change while a model trains. Empty: it can."""
    reasons = {}
    for axis in space.axes:
        key = axis.key.partition(".")[2]
        if key not in CHANGEABLE:
            near = [why for start, why in FIXED_FROM_THE_START.items() if _is_below(key, start)]
            reasons[axis.key] = near[0] if near else "is settled before the first step"
    return tuple(f"{key}: {why}" for key, why in reasons.items())


def _is_below(key: str, *parents: str) -> bool:
    return any(key == parent or key.startswith(f"{parent}.") for parent in parents)
