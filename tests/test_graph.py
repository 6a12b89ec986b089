"""The graph of a recipe: its steps, their inputs, and what a changed key runs again."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from infra.errors import UserError
from pipelines import dag, graph
from pipelines.config import RecipeSource, load_recipe, load_sweep, resolved_yaml
from pipelines.recipe import Cluster, Recipe
from pipelines.sweep import Axis

TWO = "[{kind: power, sigma_rel: 0.05}, {kind: power, sigma_rel: 0.10}]"
TRUNCATED = [
    *("isolate.method=ect", "truncate.method=tcm", "truncate.images=12_800", "truncate.batch=128"),
]
SELECTED = [
    *("select_ema.samples=100", f"distill.ema={TWO}", f"isolate.ema={TWO}"),
    *(f"truncate.ema={TWO}", "isolate.snapshots=4"),
]
WHOLE = [*TRUNCATED, *SELECTED]
NULL_BOUNDARY = {"distill": ["truncate.boundary=null"]}  # CD's, as of its preset
SPINE = ["shard", "reference", "teacher", "distill", "isolate", "evaluate", "register", "report"]


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", overrides)


def steps(*overrides: str) -> dict[str, dag.Step]:
    built = graph.build(recipe(*overrides), Cluster())
    assert len({step.name for step in built}) == len(built)
    return {step.name: step for step in built}


def inputs(step: dag.Step) -> dict[str, str]:
    """Argument -> name of the step it comes from."""
    return {alias: needed.name for alias, needed in step.inputs.items()}


def changed(before: list[str], after: list[str]) -> list[str]:
    """The steps that a change of overrides runs again."""
    old, new = steps(*before), steps(*after)
    prints = {name: step.fingerprint for name, step in old.items()}
    return [name for name, step in new.items() if prints.get(name) != step.fingerprint]


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        recipe(*overrides)
    (line,) = str(error.value).splitlines()
    return line


# --- the steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], TRUNCATED, WHOLE], ids=["spine", "truncate", "whole"])
def test_every_step_comes_after_its_inputs_and_the_report_is_last(overrides):
    built = graph.build(recipe(*overrides), Cluster())
    seen = set()
    for step in built:
        assert {needed.name for needed in step.inputs.values()} <= seen
        seen.add(step.name)
    assert built[-1].name == "report"
    assert {step.name for step in dag.topological(built[-1:])} == seen  # it needs all of them


def test_without_the_new_keys_the_graph_is_the_spine():
    assert list(steps()) == SPINE
    assert inputs(steps()["isolate"]) == {"shard": "shard"}
    assert inputs(steps("isolate.method=ect")["isolate"]) == {
        "shard": "shard",
        "teacher": "teacher",
    }


@pytest.mark.parametrize("first", ["isolate", "distill"])
def test_truncate_follows_its_first_stage_and_is_one_more_candidate(first):
    built = steps(*TRUNCATED, f"truncate.of={first}", *NULL_BOUNDARY.get(first, []))
    assert inputs(built["truncate"]) == {"shard": "shard", "first": first}
    assert built["truncate"].gang == "workers"
    for name in ("evaluate", "register"):
        given = inputs(built[name])
        assert [given[c] for c in ("distill", "isolate", "truncate")] == [
            *("distill", "isolate", "truncate")
        ]


def test_a_selection_stands_between_each_candidate_and_its_evaluation():
    built = steps(*WHOLE)
    for name in ("distill", "isolate", "truncate"):
        selection = built[f"select_ema-{name}"]
        assert inputs(selection) == {"shard": "shard", "reference": "reference", "trained": name}
        assert selection.gang == "evaluators"
        for judge in ("evaluate", "register"):
            assert inputs(built[judge])[name] == f"select_ema-{name}"
        given = inputs(built["report"])
        assert given[name] == name
        assert given[f"select_ema-{name}"] == f"select_ema-{name}"
    assert inputs(built["evaluate"])["teacher"] == "teacher"  # the teacher is as it was
    assert inputs(built["truncate"])["first"] == "isolate"  # and so is a first stage


def test_a_search_of_levels_stands_behind_what_is_selected_of_each_candidate():
    for before, of in ((TRUNCATED, "{}"), (WHOLE, "select_ema-{}")):
        built = steps(*before, "search_sigmas.steps=3")
        for name in ("distill", "isolate", "truncate"):
            search = built[f"search_sigmas-{name}"]
            assert inputs(search) == {
                "shard": "shard",
                "reference": "reference",
                "trained": of.format(name),
            }
            assert search.gang == "evaluators"
            for judge in ("evaluate", "register"):
                assert inputs(built[judge])[name] == f"search_sigmas-{name}"
            given = inputs(built["report"])
            assert given[name] == name
            assert given[f"search_sigmas-{name}"] == f"search_sigmas-{name}"
        assert inputs(built["evaluate"])["teacher"] == "teacher"  # a denoiser is not searched
        assert ("select_ema-isolate" in inputs(built["report"])) == (before is WHOLE)


# --- what a changed key runs again ---------------------------------------------------------------

JUDGED = ["evaluate", "register", "report"]
SELECTIONS = ["select_ema-distill", "select_ema-isolate", "select_ema-truncate"]


SEARCHED = [*WHOLE, "search_sigmas.steps=2"]
SEARCHES = ["search_sigmas-distill", "search_sigmas-isolate", "search_sigmas-truncate"]


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ("search_sigmas.steps=4", [*SEARCHES, *JUDGED]),
        ("search_sigmas.samples=900", [*SEARCHES, *JUDGED]),
        ("search_sigmas.seed=7", [*SEARCHES, *JUDGED]),
        ("search_sigmas.tolerance=0.1", [*SEARCHES, *JUDGED]),
        ("select_ema.samples=200", [*SELECTIONS, *SEARCHES, *JUDGED]),
        ("evaluate.mid_sigma=0.7", [*SELECTIONS, *SEARCHES, *JUDGED]),
        ("evaluate.samples=1_000", JUDGED),
        ("search_sigmas.samples=1_000", []),  # as it was
    ],
)
def test_a_key_of_the_search_runs_again_the_searches_and_what_follows(change, rerun):
    assert changed(SEARCHED, [*SEARCHED, change]) == rerun


def test_a_search_leaves_every_training_and_selection_as_it_was():
    assert changed(WHOLE, SEARCHED) == [*SEARCHES, *JUDGED]
    assert changed([], ["search_sigmas.steps=2"]) == [*SEARCHES[:2], *JUDGED]
    assert changed([], ["search_sigmas=null"]) == []
    before, after = steps(*SEARCHED), steps(*SEARCHED, "search_sigmas.grid=5")
    forms = [dag.canonical(one[SEARCHES[0]].identity().config) for one in (before, after)]
    (line,) = [after[SEARCHES[0]].as_written(line) for line in dag.diff(*forms)]
    assert line.startswith("search_sigmas.grid: ")


@pytest.mark.parametrize("key", ["samples", "confirm_samples"])
def test_a_search_of_too_few_samples_is_refused_before_any_training(key):
    with pytest.raises(UserError, match=rf"^search_sigmas.{key}: 64 samples of 64 features"):
        steps(f"search_sigmas.{key}=64")
    steps(f"search_sigmas.{key}=64", "search_sigmas.allow_rank_deficient=true")


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ("select_ema.samples=200", [*SELECTIONS, *JUDGED]),
        ("select_ema.sigma_rel=[0.08]", [*SELECTIONS, *JUDGED]),
        ("evaluate.mid_sigma=0.7", [*SELECTIONS, *JUDGED]),
        ("evaluate.samples=1_000", JUDGED),
        ("truncate.lr=1e-5", ["truncate", "select_ema-truncate", *JUDGED]),
        ("truncate.sigma_prime=2.0", ["truncate", "select_ema-truncate", *JUDGED]),
        (
            "isolate.lr=1e-5",
            ["isolate", "truncate", "select_ema-isolate", "select_ema-truncate", *JUDGED],
        ),
        ("isolate.snapshots=5", ["isolate", "truncate", *SELECTIONS[1:], *JUDGED]),
        ("reference.steps=200", ["reference", *SELECTIONS, *JUDGED]),
        ("distill.guidance=1.0", []),  # as it was
    ],
)
def test_a_changed_key_runs_again_what_depends_on_it_and_nothing_else(change, rerun):
    assert changed(WHOLE, [*WHOLE, change]) == rerun


def test_adding_the_new_stages_leaves_every_training_as_it_was():
    before = ["isolate.method=ect", f"distill.ema={TWO}", f"isolate.ema={TWO}"]
    assert changed(before, [*before, *TRUNCATED]) == ["truncate", *JUDGED]
    added = changed(before, [*before, "select_ema.samples=100"])
    assert added == [*SELECTIONS[:2], *JUDGED]


def test_a_reason_names_the_key_a_person_wrote():
    before, after = steps(*WHOLE), steps(*WHOLE, "truncate.q=4", "select_ema.samples=200")
    for name, path in (("truncate", "truncate.q"), ("select_ema-isolate", "select_ema.samples")):
        forms = [dag.canonical(one[name].identity().config) for one in (before, after)]
        (line,) = [after[name].as_written(line) for line in dag.diff(*forms)]
        assert line.startswith(f"{path}: ")


# --- lpips: a file outside the recipe ------------------------------------------------------------


def test_lpips_is_known_by_the_digest_of_its_file_not_by_its_place(tmp_path: Path):
    def with_file(name: str) -> list[str]:
        return ["distill.distance=lpips", f"distill.lpips={tmp_path / name}"]

    for name, content in (("a.pth", b"weights"), ("b.pth", b"weights"), ("c.pth", b"others")):
        (tmp_path / name).write_bytes(content)
    dependants = ["distill", *JUDGED]
    assert changed(with_file("a.pth"), with_file("b.pth")) == []
    assert changed(with_file("a.pth"), with_file("c.pth")) == dependants
    assert changed([], with_file("a.pth")) == dependants
    digest = steps(*with_file("a.pth"))["distill"].config.lpips_sha256
    assert digest == hashlib.sha256(b"weights").hexdigest()
    before = steps(*with_file("a.pth"))
    (tmp_path / "a.pth").write_bytes(b"edited")
    after = steps(*with_file("a.pth"))
    assert before["distill"].fingerprint != after["distill"].fingerprint
    assert before["teacher"].fingerprint == after["teacher"].fingerprint


def test_an_lpips_file_that_is_not_there_is_one_line_that_names_the_key(tmp_path: Path):
    for stage in ("distill", "isolate"):
        missing = recipe(f"{stage}.distance=lpips", f"{stage}.lpips={tmp_path}/nowhere.pth")
        with pytest.raises(UserError) as error:
            graph.build(missing, Cluster())
        assert str(error.value).startswith(f"{stage}.lpips: {tmp_path}/nowhere.pth does not exist")
        assert len(str(error.value).splitlines()) == 1


def test_a_relative_lpips_file_is_the_shells_for_all_later_commands(tmp_path, monkeypatch):
    from pipelines.arguments import _at_absolute_paths

    monkeypatch.chdir(tmp_path)
    keys = ("distance=lpips", "lpips=vgg.pth")
    both = [f"{stage}.{pair}" for stage in ("distill", "isolate") for pair in keys]
    absolute = _at_absolute_paths(recipe(*both))
    assert absolute.distill.lpips == absolute.isolate.lpips == str(tmp_path / "vgg.pth")
    assert _at_absolute_paths(recipe("isolate.method=sct")) == recipe("isolate.method=sct")


# --- combinations that make no sense -------------------------------------------------------------


CLASSLESS = "network.class_conditional=false"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["distill.guidance=2"],
            "distill.guidance: needs a teacher with a null class; set teacher",
        ),
        (["evaluate.teacher_guidance=2"], "evaluate.teacher_guidance: needs a teacher with a null"),
        (["distill.method=scd", "distill.guidance=2"], "distill.guidance: needs a teacher with a"),
        (["isolate.method=sct", "isolate.guidance=2"], "isolate.guidance: 2.0 guides the teacher"),
        (["isolate.guidance=2"], "isolate.guidance: 2.0 guides the teacher's path, path noise has"),
        (
            ["teacher.label_dropout=0.1", CLASSLESS],
            "teacher.label_dropout: hides classes, but network.class_conditional is false",
        ),
        (
            ["isolate.method=mean-flow", "isolate.label_dropout=0.1", CLASSLESS],
            "isolate.label_dropout: hides classes, but network.class_conditional is false",
        ),
        (["teacher.label_dropout=1"], "teacher.label_dropout: 1.0 must be in [0, 1)"),
        (
            ["isolate.method=mean-flow", "isolate.guidance=2"],
            "isolate.label_dropout: guidance needs a null class to learn, set it to 0.1",
        ),
        (
            [*TRUNCATED, "isolate.method=mean-flow"],
            "truncate.of: isolate trains a MeanFlow, which has no f to truncate",
        ),
        ([*TRUNCATED, "truncate.sigma_prime=80"], "truncate.sigma_prime: must lie between noise"),
        ([*TRUNCATED, "truncate.sigma_prime=0.002"], "truncate.sigma_prime: must lie between"),
        ([*TRUNCATED, "truncate.sigma_prime=-1"], "truncate.sigma_prime: -1.0 must be > 0"),
        ([*TRUNCATED, "truncate.boundary=0.002"], "truncate.boundary: 0.002 must be that of isola"),
        (
            [*TRUNCATED, "truncate.of=distill"],
            "truncate.boundary: 0 must be that of distill, 0.002",
        ),
        ([*TRUNCATED, "truncate.of=teacher"], "truncate.of: expected one of isolate, distill, got"),
        (
            [*TRUNCATED, "truncate.boundary_share=0.001"],
            "truncate.boundary_share: 0.001 of a batch",
        ),
        (["isolate.snapshots=4"], "isolate.snapshots: need two power EMAs to rebuild others from"),
        (
            [f"isolate.ema={TWO}", "isolate.snapshots=1_000_000"],
            "isolate.snapshots: 1000000 are more than the 750 steps",
        ),
        (
            ["select_ema.samples=100", f"distill.ema={TWO}"],
            "isolate.ema: select_ema has one EMA to choose from; give isolate.ema more entries "
            "(of two power EMAs isolate.snapshots=16 keeps",
        ),
        (
            [*WHOLE, "truncate.ema=[{kind: constant}]"],
            "truncate.ema: select_ema has one EMA to choose from",
        ),
        (["select_ema.sigma_rel=[0.3]"], "select_ema.sigma_rel: [0.3] must lie in (0, 0.28)"),
        (["select_ema.steps=3"], "select_ema.steps: expected one of 1, 2, got 3"),
        (["search_sigmas.steps=1"], "search_sigmas.steps: 1 must be in 2 to 64"),
        (["search_sigmas.grid=2"], "search_sigmas.grid: 2 must be >= 3"),
        (["search_sigmas.tolerance=0"], "search_sigmas.tolerance: 0.0 must be in 0.01 to 2"),
        (["search_sigmas.evaluations=8"], "search_sigmas.evaluations: 8 must be > grid (8)"),
        (["search_sigmas.sample=9"], "search_sigmas.sample: unknown key, did you mean 'samples'?"),
        (["distill.distance=lpips"], "distill.lpips: distance lpips needs the file of its weights"),
        (["distill.lpips=x.pth"], "distill.lpips: distance lpips needs the file of its weights"),
        (["truncate.images=12_800"], "truncate.method: missing, one of tcm"),
        (["distill.method=mean-flow"], "distill.method: mean-flow is no method of this stage, but"),
        (["isolate.kind=truncate"], "isolate.kind: expected one of discrete, scm, mean_flow, got"),
        (
            ["evaluate.teacher_churn={S_churn: -1}"],
            "evaluate.teacher_churn.S_churn: -1.0 must be > 0",
        ),
    ],
)
def test_a_combination_without_meaning_is_one_line_that_names_the_key(overrides, said):
    line = refused(*overrides)
    assert said in line


def test_the_mended_recipes_are_accepted():
    null_class = ["teacher.label_dropout=0.1"]
    assert recipe("distill.guidance=2", *null_class).distill.guidance == 2
    assert recipe("evaluate.teacher_guidance=2", *null_class).evaluate.teacher_guidance == 2
    guided = recipe("isolate.method=mean-flow", "isolate.guidance=2", "isolate.label_dropout=0.1")
    assert guided.isolate.guidance == 2
    flow = ["isolate.method=mean-flow", "truncate.of=distill", "truncate.boundary=null"]
    assert recipe(*TRUNCATED, *flow).truncate.of == "distill"
    sct = ["isolate.method=sct"]  # its f is the identity at 0 too
    assert recipe(*TRUNCATED, *sct).truncate.boundary == 0
    assert recipe(f"isolate.ema={TWO}", "isolate.snapshots=4").isolate.snapshots == 4


def test_null_takes_an_optional_stage_away_and_a_preset_brings_it_back(tmp_path):
    from pipelines.config import resolved_yaml

    assert recipe(*WHOLE, "truncate=null", "select_ema=null").truncate is None
    saved = tmp_path / "recipe.yaml"
    saved.write_text(resolved_yaml(recipe("isolate.method=ect")))  # says truncate: null
    again = load_recipe(str(saved), TRUNCATED[1:])
    assert again == recipe(*TRUNCATED)
    assert again.truncate.lr == 5e-5  # of the preset, not a default
    assert dataclasses.replace(again, truncate=None) == load_recipe(str(saved))


# --- first weights, and sweeps -------------------------------------------------------------------


def tuned(*names: str, **changes: object) -> dict[str, dag.Step]:
    sweeps = tuple(dataclasses.replace(load_sweep(name), **changes) for name in names)
    built = graph.build(dataclasses.replace(recipe(), tune=sweeps), Cluster())
    return {step.name: step for step in built}


def test_isolation_may_begin_with_the_distilled_model():
    assert inputs(steps("isolate.init=distilled")["isolate"]) == {
        "shard": "shard",
        "distilled": "distill",
    }
    assert "distill.init: distillation makes the distilled model" in refused(
        "distill.init=distilled"
    )


def test_a_sweep_stands_between_the_teacher_and_its_stage():
    both = tuned("isolation", "distillation")
    names = list(both)
    assert names.index("teacher") < names.index("tune-distill") < names.index("distill")
    assert names.index("distill") < names.index("tune-isolate") < names.index("isolate")
    first = {"shard": "shard", "reference": "reference", "teacher": "teacher"}
    assert inputs(both["tune-distill"]) == first
    # Trials of isolation may begin with the distilled model.
    assert inputs(both["tune-isolate"]) == first | {"distilled": "distill"}
    assert inputs(both["distill"]) == {
        "shard": "shard",
        "teacher": "teacher",
        "tune": "tune-distill",
    }
    assert inputs(both["isolate"]) == {
        "shard": "shard",
        "teacher": "teacher",
        "distilled": "distill",
        "tune": "tune-isolate",
    }
    seen: set[str] = set()
    for step in both.values():
        assert {needed.name for needed in step.inputs.values()} <= seen
        seen.add(step.name)


def test_a_sweep_that_never_begins_with_the_distilled_model_does_not_wait_for_it():
    lr = Axis(key="isolate.lr", range=(1e-4, 1e-2))
    alone = tuned("isolation", space=(lr,))
    assert "distilled" not in alone["tune-isolate"].inputs
    assert "distilled" not in alone["isolate"].inputs


def test_a_sweep_changes_what_comes_after_it_and_nothing_before():
    plain, swept, more = steps(), tuned("isolation"), tuned("isolation", trials=17)
    prints = {name: step.fingerprint for name, step in plain.items()}
    same = [name for name in plain if swept[name].fingerprint == prints[name]]
    assert same == ["shard", "reference", "teacher", "distill"]
    assert more["tune-isolate"].fingerprint != swept["tune-isolate"].fingerprint


def test_a_stage_has_one_sweep():
    with pytest.raises(ValueError, match="tune: two sweeps are for one stage"):
        tuned("isolation", "isolation")


def test_a_recipe_with_its_sweeps_is_written_and_read_back():
    sweeps = (load_sweep("isolation"), load_sweep("distillation"))
    whole = dataclasses.replace(recipe(), tune=sweeps)
    assert RecipeSource("recipe.yaml", resolved_yaml(whole)).recipe() == whole
