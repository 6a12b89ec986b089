"""A sweep's space: which settings it has, and what is refused before anything starts."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.space
from infra.errors import UserError
from pipelines.config import RecipeSource
from pipelines.space import Checked, Draw, Invalid, Space, as_text, check, explain_pbt
from pipelines.sweep import Axis, SweepConfig

MINIMAL = """\
name: tiny
teacher:
  images: 1_000
  batch: 100
distill:
  method: cd
  images: 1_000
  batch: 100
isolate:
  method: ict
  images: 1_000
  batch: 100
register:
  model: tiny
"""
SOURCE = RecipeSource("tiny.yaml", MINIMAL)


def axis(key: str, *choice: str, when: tuple[str, ...] | str = ()) -> Axis:
    return Axis(key=key, choice=choice, when=(when,) if isinstance(when, str) else when)


def sweep(*axes: Axis, fixed: tuple[str, ...] = (), stage: str = "isolate") -> SweepConfig:
    return SweepConfig(name="mine", stage=stage, space=axes, fixed=fixed)


SMALL = (
    axis("x.method", "a", "b"),
    axis("x.init", "s", "t", "d", when="x.method=a"),
    axis("x.init", "t", "d", when="x.method=b"),
    axis("x.kind", "c", "g", when="x.method=a"),
    axis("x.N", "1", "2", "3", when="x.kind=c"),
    axis("x.s", "4", "5", when="x.kind=g"),
    Axis(key="x.lr", range=(1e-4, 1e-2), log=True, when=("x.init=t|d",)),
)


class Guided(Draw):
    """Takes what it is told to by an axis' name, and notes who asked."""

    def __init__(self, **values: object) -> None:
        self.values = values
        self.asked: list[str] = []

    def choose(self, name: str, choices: tuple[str, ...]) -> str:
        self.asked.append(name)
        return str(self.values[name.removeprefix("x.")])

    def number(self, name: str, axis: Axis) -> float:
        self.asked.append(name)
        return self.values[name.removeprefix("x.")]  # type: ignore[return-value]


class Rolled(Draw):
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def choose(self, name: str, choices: tuple[str, ...]) -> str:
        return self.dice.choice(choices)

    def number(self, name: str, axis: Axis) -> float:
        assert axis.range is not None
        return self.dice.uniform(*axis.range)


# --- settings and combinations -------------------------------------------------------------------


def test_a_small_space_has_the_combinations_counted_by_hand():
    space = Space(SMALL)
    # a: 3 inits x (3 N + 2 s); b: 2 inits; the range counts once
    assert space.count() == 3 * (3 + 2) + 2
    found = list(space.combinations())
    assert found[:2] == [
        ("x.method=a", "x.init=s", "x.kind=c", "x.N=1"),
        ("x.method=a", "x.init=s", "x.kind=c", "x.N=2"),
    ]
    assert found[5] == ("x.method=a", "x.init=t", "x.kind=c", "x.N=1", "x.lr=0.0001")
    assert found[-2:] == [
        ("x.method=b", "x.init=t", "x.lr=0.0001"),
        ("x.method=b", "x.init=d", "x.lr=0.0001"),
    ]
    assert len(set(found)) == len(found) == 17
    assert space.has_ranges
    assert not Space(SMALL[:-1]).has_ranges


def test_only_active_axes_are_drawn_each_by_a_name_of_its_own():
    space = Space(SMALL)
    draw = Guided(**{"method": "b", "init#2": "d", "lr": 3e-3})
    assert space.settings(draw) == ("x.method=b", "x.init=d", "x.lr=0.003")
    assert draw.asked == ["x.method", "x.init#2", "x.lr"]
    draw = Guided(method="a", init="s", kind="g", s=5)
    assert space.settings(draw) == ("x.method=a", "x.init=s", "x.kind=g", "x.s=5")
    assert draw.asked == ["x.method", "x.init", "x.kind", "x.s"]


def test_a_condition_on_an_inactive_axis_does_not_hold():
    chain = (axis("x.a", "1", "2"), axis("x.b", "1", when="x.a=1"), axis("x.c", "7", when="x.b=1"))
    assert list(Space(chain).combinations()) == [("x.a=1", "x.b=1", "x.c=7"), ("x.a=2",)]


def test_several_conditions_must_all_hold():
    both = (axis("x.a", "1", "2"), axis("x.b", "1", "2"), axis("x.c", "7", when=("x.a=1", "x.b=2")))
    assert [text for text in Space(both).combinations() if "x.c=7" in text] == [
        ("x.a=1", "x.b=2", "x.c=7")
    ]


def test_a_space_too_large_to_walk_is_counted():
    space = Space(tuple(axis(f"x.k{i}", *"0123456789") for i in range(30)))
    assert space.count() == 10**30
    assert space.nth(10**30 - 1) == tuple(f"x.k{i}=9" for i in range(30))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    axes: list[Axis] = []
    for i in range(draw(st.integers(1, 6))):
        when = []
        for other in draw(st.lists(st.sampled_from(axes), max_size=2, unique=True)) if axes else []:
            some = st.lists(st.sampled_from(other.choice), min_size=1, unique=True)
            when.append(f"{other.key}={'|'.join(draw(some))}")
        choice = [str(n) for n in range(draw(st.integers(1, 3)))]
        axes.append(axis(f"x.k{i}", *choice, when=tuple(when)))
    return Space(tuple(axes))


def by_brute_force(axes: tuple[Axis, ...]) -> set[tuple[str, ...]]:
    """All products of all choices, each cut down to its active axes."""
    found = set()
    for values in itertools.product(*(axis.choice for axis in axes)):
        active: dict[str, str] = {}
        for one, value in zip(axes, values, strict=True):
            if all(active.get(key) in allowed for key, allowed in one.conditions()):
                active[one.key] = value
        found.add(tuple(f"{key}={value}" for key, value in active.items()))
    return found


@settings(deadline=None, max_examples=150)
@given(space=spaces(), seed=st.integers(0, 99), most=st.integers(1, 40))
def test_combinations_are_what_brute_force_finds_and_what_may_be_drawn(space, seed, most):
    found = list(space.combinations())
    assert len(found) == space.count()
    assert len(set(found)) == len(found)
    assert set(found) == by_brute_force(space.axes)
    assert space.settings(Rolled(seed)) in set(found)
    spread = list(space.spread(most))
    assert len(set(spread)) == len(spread) == min(most, len(found))
    assert set(spread) <= set(found)


@settings(deadline=None, max_examples=100)
@given(space=spaces(), data=st.data())
def test_a_part_of_a_space_holds_the_combinations_with_the_value(space, data):
    at = data.draw(st.integers(0, len(space.axes) - 1))
    value = data.draw(st.sampled_from(space.axes[at].choice))
    part = list(space.holding(at, value).combinations())
    text = f"{space.axes[at].key}={value}"
    assert part == [found for found in space.combinations() if text in found]


@settings(deadline=None, max_examples=50)
@given(space=spaces(), data=st.data())
def test_the_order_of_unrelated_axes_changes_nothing_but_the_order(space, data):
    free = tuple(axis(f"x.free{i}", "p", "q") for i in range(2))
    at = data.draw(st.integers(0, len(space.axes)))
    mixed = Space((*space.axes[:at], *free, *space.axes[at:]))
    after = Space((*space.axes, *reversed(free)))
    assert mixed.count() == after.count() == 4 * space.count()
    assert {frozenset(c) for c in mixed.combinations()} == {
        frozenset(c) for c in after.combinations()
    }


@pytest.mark.parametrize("sizes", [(2,) * 13, (10, 9, 8, 7, 6), (700, 2), (3, 900)])
def test_a_spread_over_a_large_space_meets_every_value_about_as_often(sizes):
    """A plain stride of count / most would show one value of the last axis only."""
    axes = tuple(axis(f"x.k{i}", *map(str, range(size))) for i, size in enumerate(sizes))
    seen = list(Space(axes).spread(512))
    assert len(set(seen)) == 512
    for i, size in enumerate(sizes):
        if size <= 10:
            counts = [sum(c[i] == f"x.k{i}={value}" for c in seen) for value in range(size)]
            assert min(counts) > 0.7 * 512 / size, (i, counts)


def test_a_key_active_twice_is_a_mistake_of_the_space():
    twice = (
        axis("isolate.method", "ict", "ect"),
        axis("isolate.init", "scratch", "teacher", when="isolate.method=ict"),
        axis("isolate.init", "teacher"),
    )
    said = r"space\[2\] isolate\.init: a second axis .* where isolate\.method=ict, isolate\.init="
    with pytest.raises(UserError, match=said):
        Space(twice).count()
    with pytest.raises(UserError, match=f"^sweep mine: {said}"):
        check(sweep(*twice), SOURCE)


# --- numbers -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(low=st.floats(1e-300, 1e300), high=st.floats(1e-300, 1e300))
def test_a_number_is_the_shortest_text_that_reads_back_the_same(low, high):
    if not low < high:
        return
    space = Space((Axis(key="isolate.lr", range=(low, high)),))
    (setting,) = space.settings(Guided(**{"isolate.lr": high}))
    text = setting.removeprefix("isolate.lr=")
    assert text == repr(high)
    assert list(space.combinations()) == [(f"isolate.lr={low!r}",)]


@pytest.mark.parametrize("number", [1e-05, 1e16, 0.1 + 0.2, 5e-324, 2.0, 123456.789])
def test_a_recipe_reads_the_very_number_that_was_drawn(number):
    space = Space((Axis(key="isolate.lr", range=(0.0, 1e17)),))
    read = SOURCE.recipe(space.settings(Guided(**{"isolate.lr": number}))).isolate.lr
    assert read == number


def test_a_number_of_an_integer_axis_reads_as_an_integer():
    N = Axis(key="isolate.batch", range=(2, 900), integer=True)
    assert as_text(N, 64.0) == "64"
    assert Space((N,)).values(0) == ("2", "900")
    assert SOURCE.recipe([f"isolate.batch={as_text(N, 64)}"]).isolate.batch == 64


def test_the_low_end_stands_for_a_range():
    space = Space((Axis(key="x.n", range=(2, 9), integer=True), axis("x.a", "1", "2")))
    assert list(space.combinations()) == [("x.n=2", "x.a=1"), ("x.n=2", "x.a=2")]


# --- refusals ------------------------------------------------------------------------------------


def refusals(config: SweepConfig, source: RecipeSource = SOURCE) -> list[str]:
    with pytest.raises(UserError) as error:
        check(config, source)
    lines = str(error.value).splitlines()
    assert all(line.startswith("sweep mine: ") for line in lines), lines
    return [line.removeprefix("sweep mine: ") for line in lines]


ICT = axis("isolate.method", "ict", "ect")
TARGET = axis("isolate.target.kind", "ema", "stop_grad", when="isolate.method=ict")
REFUSED = [
    (
        sweep(axis("teacher.lr", "1e-3")),
        "space[0] teacher.lr: trials train isolate alone, so keys begin with isolate.",
    ),
    (
        sweep(axis("isolates.lr", "1e-3")),
        "space[0] isolates.lr: trials train isolate alone, so keys begin with isolate.",
    ),
    (
        sweep(axis("isolate.images", "500", "1_000")),
        "space[0] isolate.images: the budget is no axis; set `budget`, a share of it",
    ),
    (
        sweep(axis("isolate.ema", "[{kind: power}]", "[{kind: constant}]")),
        "space[0] isolate.ema: the sampling EMA is no axis, it changes no training; name all of "
        "them in fixed: 'isolate.ema=[...]', every trial scores each (or rebuild other lengths "
        "afterwards: select_ema with isolate.snapshots)",
    ),
    (
        sweep(axis("distill.snapshots", "2", "4"), stage="distill"),
        "space[0] distill.snapshots: the sampling EMA is no axis, it changes no training; name all "
        "of them in fixed: 'distill.ema=[...]', every trial scores each (or rebuild other lengths "
        "afterwards: select_ema with distill.snapshots)",
    ),
    (
        sweep(axis("isolate.lrr", "1e-3", "1e-4")),
        "space[0] isolate.lrr=1e-3|1e-4 is in no valid combination: unknown key, did you mean "
        "'lr'?; mend it, leave it out or narrow it with `when`",
    ),
    (
        sweep(ICT, axis("isolate.pairs.Q", "2", "4", when="isolate.method=ect")),
        "space[1] isolate.pairs.Q=2|4 is in no valid combination: unknown key (known: kind, "
        "P_mean, P_std, q, stages, k, b, max_ratio); mend it, leave it out or narrow it",
    ),
    (
        sweep(TARGET),
        "space[0] isolate.target.kind: when: isolate.method is no axis before this one",
    ),
    (
        sweep(ICT, axis("isolate.lr", "1", when="isolate.metod=ict")),
        "space[1] isolate.lr: when: isolate.metod is no axis before this one, did you mean "
        "'isolate.method'?",
    ),
    (
        sweep(ICT, axis("isolate.lr", "1", when="isolate.method=itc|ect")),
        "space[1] isolate.lr: when: isolate.method is never itc, did you mean 'ict'? "
        "(it has ict, ect)",
    ),
    (
        sweep(
            Axis(key="isolate.lr", range=(0.1, 0.2)),
            axis("isolate.batch", "9", when="isolate.lr=1"),
        ),
        "space[1] isolate.batch: when: isolate.lr is a range; a condition names a choice",
    ),
    (
        sweep(ICT, fixed=("isolate.dropout",)),
        "fixed[0] 'isolate.dropout': expected key=value, such as isolate.dropout=0.1",
    ),
    (
        sweep(ICT, fixed=("isolate.lr=1e-3", "distill.lr=1e-3")),
        "fixed[1] 'distill.lr=1e-3': trials train isolate alone; keep to its keys",
    ),
    (
        sweep(ICT, fixed=("isolate.method =ict",)),
        "fixed[0] 'isolate.method =ict': is an axis as well; take it out of fixed or of the space",
    ),
    (
        sweep(ICT, fixed=("isolate.lr=fast",)),
        "fixed: isolate.lr=fast: expected a finite number, got fast",
    ),
    (
        sweep(ICT, fixed=("isolate.pairs.q=4",)),  # not of the recipe's own method, which is tried
        "fixed: isolate.pairs.q=4: unknown key (known: kind, levels, P_mean, P_std)",
    ),
    (
        sweep(axis("isolate.method", "ict", "itc")),
        "space[0] isolate.method=itc is in no valid combination: unknown method itc, did you mean "
        "'ict'? ",
    ),
    (
        sweep(axis("isolate.dropout", "0", "1", "2")),
        [
            "space[0] isolate.dropout=1 is in no valid combination: 1.0 must be in [0, 1); mend "
            "it, leave it out or narrow it with `when`",
            "space[0] isolate.dropout=2 is in no valid combination: 2.0 must be in [0, 1); mend "
            "it, leave it out or narrow it with `when`",
        ],
    ),
    (
        sweep(Axis(key="isolate.dropout", range=(0.5, 1.0))),  # the high end
        "space[0] isolate.dropout=1.0 is in no valid combination: 1.0 must be in [0, 1); mend it, "
        "leave it out or narrow it with `when`",
    ),
    (
        sweep(Axis(key="isolate.batch", range=(2, 4))),  # no `integer: true`
        "space[0] isolate.batch=2.0|4.0 is in no valid combination: expected integers, set "
        "`integer: true`",
    ),
    (
        sweep(
            axis("isolate.pairs.levels.s0", "10", "20"),
            axis("isolate.pairs.levels.s1", "5", "15", "30"),
        ),
        "space[1] isolate.pairs.levels.s1=5 is in no valid combination: 5 must be >= s0",
    ),
    (
        sweep(
            ICT,
            TARGET,
            axis("isolate.dropout", "0.5", when=("isolate.method=ect", "isolate.target.kind=ema")),
        ),
        "space[2] isolate.dropout: is never active, mend its `when`",
    ),
    (
        sweep(axis("isolate.path", "noise", "heun")),
        "space[0] isolate.path=heun is in no valid combination: isolation training has no "
        "teacher in the loss (noise); mend it, leave it out or narrow it with `when`",
    ),
]


@pytest.mark.parametrize(("config", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_a_mistake_of_a_sweep_is_one_line_that_says_how_to_mend_it(config, expected):
    lines = refusals(config)
    expected = [expected] if isinstance(expected, str) else expected
    assert len(lines) == len(expected), lines
    assert all(line.startswith(text) for line, text in zip(lines, expected, strict=True)), lines


def test_mistakes_of_axes_and_of_fixed_come_at_once():
    lines = refusals(sweep(axis("isolate.images", "1"), axis("x.y", "1"), fixed=("distill.lr=1",)))
    assert [line.partition(":")[0] for line in lines] == [
        "space[0] isolate.images",
        "space[1] x.y",
        "fixed[0] 'distill.lr=1'",
    ]


def test_the_cause_is_named_and_not_what_it_drags_along():
    """All of ECT fails by one misspelt axis below it; neither the method nor q is to blame."""
    lines = refusals(
        sweep(
            ICT,
            axis("isolate.pairs.q", "2", "4", when="isolate.method=ect"),
            axis("isolate.pairs.stage", "1", "2", when="isolate.method=ect"),
        )
    )
    assert len(lines) == 1
    assert lines[0].startswith(
        "space[2] isolate.pairs.stage=1|2 is in no valid combination: unknown key"
    )


def test_a_value_that_fails_by_different_causes_is_explained_by_them():
    lines = refusals(
        sweep(
            ICT,
            axis("isolate.dropout", "1", when="isolate.method=ect"),
            axis("isolate.batch", "0", "9", when="isolate.method=ect"),
        )
    )
    assert [line.split(" ")[1] for line in lines] == ["isolate.dropout=1", "isolate.batch=0"]


def test_a_recipe_that_rules_out_a_method_gives_its_reason():
    truncated = RecipeSource(
        "tiny.yaml",
        MINIMAL.replace("method: ict", "method: ect"),
        ("truncate.method=tcm", "truncate.images=1_000", "truncate.batch=100"),
    )
    (line,) = refusals(
        sweep(axis("isolate.method", "ect", "ict"), axis("isolate.lr", "1", "2")), truncated
    )
    assert line.startswith(
        "space[0] isolate.method=ict is in no valid combination: override 'truncate.m"
    )
    assert "truncate.boundary: 0 must be that of isolate, 0.002; mend it, " in line


def test_a_recipe_of_its_own_mistakes_says_them_itself():
    with pytest.raises(UserError, match=r"^tiny\.yaml:3:11: teacher\.images: expected an integer"):
        check(sweep(ICT), RecipeSource("tiny.yaml", MINIMAL.replace("1_000", "many", 1)))


# --- what is valid -------------------------------------------------------------------------------


def test_invalid_combinations_are_told_with_their_reason_and_the_rest_is_counted():
    config = sweep(
        axis("isolate.pairs.levels.s0", "10", "20"),
        axis("isolate.pairs.levels.s1", "15", "30"),
        fixed=("isolate.lr=1e-4",),
    )
    why = "isolate.pairs.levels.s1=15: 15 must be >= s0 (20)"
    left_out = Invalid(("isolate.pairs.levels.s0=20", "isolate.pairs.levels.s1=15"), why)
    assert check(config, SOURCE) == Checked(valid=3, looked_at=4, invalid=(left_out,))


def test_a_reason_has_no_place_in_a_file():
    said = MINIMAL.replace("method: ict", "method: ict\n  pairs: {levels: {s0: 20}}")
    config = sweep(axis("isolate.pairs.levels.s1", "15", "30"))
    (line,) = refusals(config, RecipeSource("a b/tiny.yaml", said))
    assert "tiny.yaml" not in line
    assert line.startswith("space[0] isolate.pairs.levels.s1=15 is in no valid combination: 15")
    truncated = (
        MINIMAL.replace("method: ict", "method: ect") + "truncate: {method: tcm, images: 600}\n"
    )
    config = sweep(axis("isolate.method", "ect", "ict"))
    (line,) = refusals(config, RecipeSource("a b/tiny.yaml", truncated))
    assert "no valid combination: truncate.boundary: 0 must be that of isolate, 0.002;" in line


def test_a_large_space_is_looked_at_in_part_and_rare_values_are_still_found(monkeypatch):
    monkeypatch.setattr(pipelines.space, "MOST", 8)
    monkeypatch.setattr(pipelines.space, "MOST_OF_A_VALUE", 3)
    wide = sweep(
        axis("isolate.seed", *map(str, range(3))),
        axis("isolate.lr", *(f"{n}e-4" for n in range(1, 9))),
        axis("isolate.dropout", "0", "0.1", "0.2"),
    )
    (line,) = refusals(wide)
    assert line.startswith("space[0] isolate.seed=0|1|2 is in no valid combination: unknown key")
    checked = check(sweep(*wide.space[1:], axis("isolate.batch", "10", "20")), SOURCE)
    assert checked == Checked(valid=8, looked_at=8, invalid=())
    (line,) = refusals(sweep(*wide.space[1:], axis("isolate.batch", "10", "2_000")))
    assert line.startswith("space[2] isolate.batch=2_000 is in no valid combination: ")


# --- population-based training -------------------------------------------------------------------


def test_a_space_of_keys_that_may_change_allows_pbt():
    keys = ["lr", "grad_clip", "pairs.P_mean", "pairs.P_std", "huber_c", "tangent_c", "dropout"]
    axes = (Axis(key=f"isolate.{key}", range=(0.1, 0.2)) for key in keys)
    assert explain_pbt(Space(tuple(axes))) == ()


def test_every_key_that_may_not_change_has_one_reason():
    frozen = (
        axis("isolate.method", "ict", "ect"),
        axis("isolate.init", "scratch", when="isolate.method=ict"),
        axis("isolate.init", "teacher", when="isolate.method=ect"),
        axis("isolate.pairs.levels.s1", "20"),
        axis("isolate.pairs.q", "2"),
        axis("isolate.target.mu", "0.9"),
        axis("isolate.lr", "1"),
        axis("isolate.batch", "8"),
        axis("isolate.flip", "true"),
    )
    reasons = explain_pbt(Space(frozen))
    assert reasons[0] == "isolate.method: another objective and networks"
    assert [reason.partition(":")[0] for reason in reasons] == [
        *("isolate.method", "isolate.init", "isolate.pairs.levels.s1", "isolate.pairs.q"),
        *("isolate.target.mu", "isolate.batch", "isolate.flip"),
    ]
    assert "N(k) is a function of k/K from the start" in reasons[2]


def test_a_space_imports_neither_torch_nor_ray_nor_optuna():
    code = (
        "import sys, pipelines.space;"
        "print(sorted({'torch', 'ray', 'mlflow', 'numpy', 'optuna'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
