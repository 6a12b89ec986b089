"""The identity of a config: stable across releases, different for different values, never a guess.

The golden file is rewritten, on purpose only, by `python tests/test_fingerprint.py`; doing so means
that every finished step of every user is run again.
"""

import dataclasses
import enum
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consistency.config import TeacherConfig
from consistency.method_config import ConstantLevels, RatioPairs, UniformPairs
from pipelines.config import load_recipe
from pipelines.fingerprint import canonical, canonical_json, diff, fingerprint_of

GOLDEN = Path(__file__).parent / "assets" / "fingerprint.json"


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    rate: float
    flag: bool
    inner: Inner
    items: tuple[object, ...]
    nothing: None = None


@dataclass(frozen=True)
class Twin:
    size: int
    name: str = "x"


HAND_MADE = Outer(0.1, True, Inner(3, "Zürich"), (1, 1.0, -2e-05, "1", (), None, Inner(2**70)))


def test_the_canonical_form_and_the_hash_of_a_known_config_never_change():
    golden = json.loads(GOLDEN.read_text())
    assert canonical(HAND_MADE) == golden["canonical"]
    assert canonical_json(canonical(HAND_MADE)) == canonical_json(golden["canonical"])
    assert fingerprint_of(HAND_MADE) == golden["sha256"]


def test_field_order_does_not_matter():
    form = canonical(Inner(3))
    assert isinstance(form, dict)
    assert canonical_json(dict(reversed(form.items()))) == canonical_json(form)


def test_int_float_bool_text_none_and_empty_are_all_distinct():
    values = [
        0,
        1,
        1.0,
        True,
        False,
        "1",
        "1.0",
        "true",
        "",
        None,
        (),
        (1,),
        (1.0,),
        ((1,),),
        "None",
    ]
    assert len({fingerprint_of(value) for value in values}) == len(values)


def test_equal_values_of_another_class_differ():
    assert fingerprint_of(Inner(3)) != fingerprint_of(Twin(3))
    assert fingerprint_of((Inner(3),)) != fingerprint_of((Twin(3),))


def test_minus_zero_is_zero_as_it_is_for_equality():
    assert fingerprint_of(-0.0) == fingerprint_of(0.0)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(lambda x: abs(x) != float("inf"))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.builds(Inner, inner, inner)
        | st.builds(Twin, inner, inner)
    ),
    max_leaves=6,
)


def exactly_equal(a: object, b: object) -> bool:
    """Equality that tells 1, 1.0 and True apart, at every depth."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(exactly_equal, a, b))  # type: ignore[arg-type]
    if dataclasses.is_dataclass(a):
        return all(
            exactly_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
        )
    return a == b


@settings(deadline=None)
@given(VALUES, VALUES)
def test_two_fingerprints_are_equal_exactly_when_the_values_are(a, b):
    assert (fingerprint_of(a) == fingerprint_of(b)) == exactly_equal(a, b)
    assert (diff(canonical(a), canonical(b)) == []) == exactly_equal(a, b)


@settings(deadline=None)
@given(VALUES)
def test_the_canonical_form_survives_json(value):
    form = canonical(value)
    again = json.loads(json.dumps(form))
    assert canonical_json(again) == canonical_json(form)
    assert diff(form, again) == []


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        print,
        lambda: 1,
        {1, 2},
        frozenset(),
        [1],
        {"a": 1},
        b"x",
        1j,
        object(),
        Path("x"),
        Colour.RED,
        Text("x"),
        Inner,
        range(3),
        pytest,
    ],
    ids=repr,
)
def test_what_has_no_canonical_form_is_refused_with_its_place(value):
    with pytest.raises(TypeError, match="no canonical form"):
        canonical(value)
    with pytest.raises(TypeError, match=r"^items\[1\]\.size: a \w+ has no canonical form"):
        fingerprint_of(Outer(0.0, False, Inner(1), (0, Inner(value))))  # type: ignore[arg-type]


def test_a_numpy_number_is_refused():
    numpy = pytest.importorskip("numpy")
    for value in (numpy.float64(1.0), numpy.int64(1), numpy.bool_(True), numpy.zeros(1)):
        with pytest.raises(TypeError):
            canonical(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"^rate: "):
        canonical(Outer(value, True, Inner(1), ()))


# --- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        ([], []),
        (["teacher.lr=0.004"], ["teacher.lr: 0.002 -> 0.004"]),
        (["register.max_distance=1"], ["register.max_distance: null -> 1.0"]),
        (["network.channel_mult=[1,2,2]"], ["network.channel_mult: [1, 2] -> [1, 2, 2]"]),
        (["network.channel_mult=[1,4]"], ["network.channel_mult: [1, 2] -> [1, 4]"]),
        (["distill.pairs.levels.N=40"], ["distill.pairs.levels.N: 18 -> 40"]),
        (["isolate.pairs.kind=ratio"], ["isolate.pairs.kind: lognormal -> ratio"]),
        (
            ["teacher.ema=[{kind: power, sigma_rel: 0.05}]"],
            ["teacher.ema[0].sigma_rel: 0.1 -> 0.05"],
        ),
        (["teacher.flip=true", "seed=3"], ["seed: 0 -> 3", "teacher.flip: false -> true"]),
    ],
)
def test_a_difference_names_the_key_and_both_values(overrides, lines):
    old, new = load_recipe("quickstart"), load_recipe("quickstart", overrides)
    assert diff(canonical(old), canonical(new)) == lines


def test_a_difference_of_type_alone_is_still_seen():
    assert diff(canonical(Inner(1)), canonical(Inner("1"))) == ['size: 1 -> "1"']  # type: ignore[arg-type]
    assert diff(canonical(1), canonical(True)) == ["value: 1 -> true"]
    assert diff(canonical(Inner(1)), canonical(Twin(1))) == [
        "value: Inner(size=1, name=x) -> Twin(size=1, name=x)"
    ]


def test_keys_of_another_release_are_absent_on_one_side():
    form = canonical(Inner(3))
    assert isinstance(form, dict)
    older = {name: value for name, value in form.items() if name != "name"}
    assert diff(older, form) == ["name: (absent) -> x"]
    assert diff(form, older) == ["name: x -> (absent)"]


def test_configs_of_the_product_have_a_form():
    teacher = TeacherConfig(images=1_000)
    assert fingerprint_of(teacher) == fingerprint_of(dataclasses.replace(teacher))
    assert fingerprint_of(teacher) != fingerprint_of(dataclasses.replace(teacher, lr=1e-4))
    pairs = (UniformPairs(), UniformPairs(levels=ConstantLevels(N=19)), RatioPairs())
    assert len({fingerprint_of(p) for p in pairs}) == 3


if __name__ == "__main__":
    content = {"canonical": canonical(HAND_MADE), "sha256": fingerprint_of(HAND_MADE)}
    GOLDEN.write_text(json.dumps(content, indent=2) + "\n")
