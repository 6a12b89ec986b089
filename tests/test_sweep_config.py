"""Reading a sweep file, and a recipe's text as something to vary."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import pipelines.config
from infra.errors import UserError
from pipelines.config import (
    RecipeSource,
    load_recipe,
    load_sweep,
    names,
    read_source,
    resolved_yaml,
)
from pipelines.strict_yaml import Mark
from pipelines.sweep import Axis, SweepConfig

SWEEP = """\
name: mine
stage: isolate
fixed: ['isolate.ema=[{kind: power}, {kind: constant}]']
space:
  - key: isolate.method
    choice: [ict, ect]
  - key: isolate.pairs.levels.s1
    choice: [80, 1_280, 1e2, 007]
    when: [isolate.method = ict | ct]
  - key: isolate.flip
    choice:
      - true
      - 'false'
  - key: isolate.huber_c
    choice: [null, ~, 0.03]
  - key: isolate.target
    choice: ['{kind: ema, mu: 0.95}', "{kind: stop_grad}"]
  - key: isolate.lr
    range: [1e-4, 1e-2]
    log: true
  - key: isolate.batch
    range: [32, 64]
    integer: true
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def mistakes(path: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_sweep(path, overrides)
    return str(error.value).replace(f"{Path(path).parent}/", "").splitlines()


# --- sweeps --------------------------------------------------------------------------------------


def test_choices_are_kept_as_they_are_written(tmp_path):
    config = load_sweep(write(tmp_path, SWEEP))
    assert [axis.choice for axis in config.space] == [
        ("ict", "ect"),
        ("80", "1_280", "1e2", "007"),
        ("true", "false"),
        ("null", "~", "0.03"),
        ("{kind: ema, mu: 0.95}", "{kind: stop_grad}"),
        (),
        (),
    ]
    assert config.space[1].conditions() == (("isolate.method", ("ict", "ct")),)
    assert config.space[5] == Axis(key="isolate.lr", range=(1e-4, 1e-2), log=True)
    assert config.space[6].integer
    assert config.fixed == ("isolate.ema=[{kind: power}, {kind: constant}]",)
    assert (config.trials, config.budget) == (16, 1.0)


def test_a_sweep_survives_its_resolved_form(tmp_path):
    config = load_sweep(write(tmp_path, SWEEP))
    assert load_sweep(write(tmp_path, resolved_yaml(config), "again.yaml")) == config


def test_overrides_win_over_the_file_also_a_whole_space(tmp_path):
    path = write(tmp_path, SWEEP)
    space = "space=[{key: isolate.lr, choice: [1e-3, 2e-3]}]"
    config = load_sweep(path, ["trials=4", "budget=0.25", "search=random", space])
    assert (config.trials, config.budget, config.search) == (4, 0.25, "random")
    assert config.space == (Axis(key="isolate.lr", choice=("1e-3", "2e-3")),)


MISTAKES = [
    ("name: mine", "nmae: mine", "1:1: nmae: unknown key, did you mean 'name'?"),
    ("name: mine\n", "", "1:1: name: missing, there is no default"),
    ("stage: isolate", "stage: isolation", "2:8: stage: expected one of isolate, distill, got"),
    ("stage: isolate", "stage: isolate\ntrials: 0", "3:9: trials: 0 must be >= 1"),
    ("stage: isolate", "stage: isolate\nprobes: 3\ngrace: 4", "4:8: grace: 4 must lie in 1..prob"),
    ("choice: [ict, ect]", "choices: [ict]", "6:5: space[0].choices: unknown key, did you mean 'c"),
    ("choice: [ict, ect]", "choice: ict", "6:13: space[0].choice: expected a list [..., ...], got"),
    (
        "choice: [ict, ect]",
        "choice: []",
        "6:13: space[0].choice: isolate.method takes a choice of values or a range, one of the two",
    ),
    (
        "choice: [ict, ect]",
        "choice: [ict, 'ict']",
        "6:13: space[0].choice: isolate.method names a value twice",
    ),
    (
        "'{kind: ema, mu: 0.95}'",
        "{kind: ema, mu: 0.95}",
        "17:14: space[4].choice[0]: expected text, got a mapping; quote it, such as "
        "'{kind: ema, mu: 0.95}'",
    ),
    ("- true", "- [1, 2]", "12:9: space[2].choice[0]: expected text, got a list; quote it"),
    ("- true", "-", "12:8: space[2].choice[0]: expected text, got nothing"),
    ("key: isolate.lr", "key: lr", "18:10: space[5].key: 'lr' is no dotted key of a recipe, such"),
    ("range: [1e-4, 1e-2]", "range: [1e-2, 1e-4]", "18:10: space[5].key: isolate.lr's range mu"),
    ("range: [1e-4, 1e-2]", "range: [0, 1]", "20:10: space[5].log: isolate.lr needs a range above"),
    (
        "range: [32, 64]",
        "range: [32.5, 64]",
        "23:14: space[6].integer: isolate.batch needs a range",
    ),
    ("[isolate.method = ict | ct]", "[isolate.method]", "9:11: space[1].when: 'isolate.method' is"),
    ("[isolate.method = ict | ct]", "[a=b|]", "9:11: space[1].when: 'a=b|' is no condition, such"),
    (SWEEP[SWEEP.index("space:") :], "space: []", "4:8: space: has no axis"),
    (SWEEP[SWEEP.index("space:") :], "space: {a: 1}", "4:8: space: expected a list"),
    (SWEEP[SWEEP.index("space:") :], "space: [7]", "4:9: space[0]: expected a mapping, got 7"),
    (SWEEP, "- a\n", "1:1: expected a mapping (key: value), got a list"),
]


@pytest.mark.parametrize(("old", "new", "line"), MISTAKES)
def test_a_mistake_in_a_sweep_is_one_line_with_its_place(tmp_path, old, new, line):
    assert SWEEP.count(old) == 1
    lines = mistakes(write(tmp_path, SWEEP.replace(old, new)))
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"mine.yaml:{line}")


def test_all_mistakes_of_a_sweep_come_at_once(tmp_path):
    text = SWEEP.replace("name: mine", "name: 3").replace("- true", "- {a: 1}")
    lines = mistakes(write(tmp_path, text), "trials=many", "serch=tpe")
    assert [line.partition(": ")[0] for line in lines] == [
        *("mine.yaml:1:7", "mine.yaml:12:9", "override 'trials=many'", "override 'serch=tpe'")
    ]


def test_an_unknown_sweep_lists_the_near_and_the_packaged_ones():
    assert names("sweeps") == ["distillation", "isolation"]
    with pytest.raises(UserError, match=r"unknown sweep 'isolatoin', did you mean 'isolation'"):
        load_sweep("isolatoin")


def test_what_a_sweep_cannot_be_is_refused_by_the_field():
    with pytest.raises(ValueError, match=r"^budget: 0 must be in \(0, 1\]"):
        SweepConfig(name="a", stage="isolate", space=(Axis(key="a.b", choice=("1",)),), budget=0)
    with pytest.raises(ValueError, match=r"^choice: a\.b takes a choice of values or a range"):
        Axis(key="a.b", choice=("1",), range=(0, 1))


# --- a recipe's text -----------------------------------------------------------------------------


def test_a_source_is_the_recipe_and_extra_overrides_come_last():
    source = read_source("quickstart", ["isolate.lr=1e-3", "seed=7"])
    assert source.recipe() == load_recipe("quickstart", ["isolate.lr=1e-3", "seed=7"])
    extra = ["isolate.lr=5e-4", "isolate.method=ect"]
    recipe = source.recipe(extra)
    assert recipe == load_recipe("quickstart", ["isolate.lr=1e-3", "seed=7", *extra])
    assert (recipe.seed, recipe.isolate.lr, recipe.isolate.method) == (7, 5e-4, "ect")


def test_recipes_of_one_source_do_not_touch_each_other():
    """They share the nodes of one parsed text, and of the presets."""
    source = read_source("quickstart")
    extras = [
        [],
        ["isolate.method=ect", "isolate.pairs.q=4"],
        ["isolate.method=ct-2023", "isolate.target.mu=0.5", "isolate.pairs.levels.kind=constant"],
        ["distill.method=scd", "isolate.pairs.levels.s1=20"],
        ["select_ema={steps: 1}", "isolate.ema=[{kind: power}, {kind: constant}]"],
        ["isolate.nonsense=1"],
    ]

    def outcome(extra: list[str]) -> object:
        try:
            return source.recipe(extra)
        except UserError as error:
            return str(error)

    alone = []
    for extra in extras:
        pipelines.config._parsed.cache_clear()
        alone.append(outcome(extra))
    pipelines.config._parsed.cache_clear()
    assert [outcome(extra) for extra in extras] == alone
    assert [outcome(extra) for extra in reversed(extras)] == alone[::-1]
    assert len({str(one) for one in alone}) == len(extras)


def test_a_text_is_parsed_once_however_often_it_is_varied(monkeypatch):
    parsed: list[Mark] = []
    real = pipelines.config.parse

    def counted(text, start, *rest):
        parsed.append(start)
        return real(text, start, *rest)

    monkeypatch.setattr(pipelines.config, "parse", counted)
    pipelines.config._parsed.cache_clear()
    source = read_source("quickstart")
    for s1 in range(20, 30):
        source.recipe([f"isolate.pairs.levels.s1={s1}"])
    assert [Path(mark.source).name for mark in parsed] == ["quickstart.yaml", "cd.yaml", "ict.yaml"]


def test_a_mistake_in_the_text_is_told_every_time(tmp_path):
    source = RecipeSource("here.yaml", "name: tiny\nname: tiny\n")
    said = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            source.recipe()
        said.append(str(error.value))
    assert "here.yaml:2:1: name: duplicate key, first at here.yaml:1:1" in said[0].splitlines()
    assert said[0] == said[1]
    with pytest.raises(UserError, match=r"here\.yaml:1:1: expected a mapping"):
        RecipeSource("here.yaml", "- a").recipe()


def test_a_source_goes_to_another_process_that_has_not_the_file(tmp_path):
    text = Path(pipelines.config.__file__).parent.parent / "configs" / "recipes" / "quickstart.yaml"
    path = write(tmp_path, text.read_text(encoding="utf-8"))
    source = read_source(path, ["seed=7"])
    expected = resolved_yaml(source.recipe(["isolate.method=ect"]))
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    Path(path).unlink()
    code = (
        f"import pickle, sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r});"
        "from pipelines.config import resolved_yaml;"
        "source = pickle.loads(open('source', 'rb').read());"
        "print(resolved_yaml(source.recipe(['isolate.method=ect'])), end='')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout == expected
