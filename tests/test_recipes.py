"""Every packaged recipe, cluster and method loads, and every key in them is read by the code."""

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import yaml

import consistency.config
import consistency.method_config
import pipelines.recipe
from consistency.config import ChurnConfig
from consistency.method_config import (
    ConsistencyConfig,
    MeanFlowConfig,
    SCMConfig,
    TruncateConfig,
)
from infra.errors import UserError
from pipelines.config import METHOD_PARTS, load_cluster, load_recipe, names, resolved_yaml
from pipelines.fingerprint import canonical
from pipelines.recipe import Recipe

ROOT = Path(__file__).parent.parent
# Fields that no code has to read, and why.
READ_ELSEWHERE = {
    "kind": "tells the members of a union apart while loading",
    "method": "names the preset, which is merged before the class exists",
    "head_channels": "by NetworkConfig.heads, which every network asks",
    **{
        name: "handed on whole by ChurnConfig.arguments, see its own test below"
        for name in ("S_churn", "S_min", "S_max", "S_noise")
    },
}
PAPERS = ["cifar10", "cifar10-scm", "imagenet64", "lsun256"]  # GPU-weeks, so nobody ran them here
# The section a preset is made for, and what builds it there.
MADE_FOR = {
    "cd": ("distill", ConsistencyConfig),
    "ct-2023": ("isolate", ConsistencyConfig),
    "ect": ("isolate", ConsistencyConfig),
    "ect-1hour": ("isolate", ConsistencyConfig),
    "ect-imagenet64": ("isolate", ConsistencyConfig),
    "ict": ("isolate", ConsistencyConfig),
    "mean-flow": ("isolate", MeanFlowConfig),
    "scd": ("distill", SCMConfig),
    "sct": ("isolate", SCMConfig),
    "tcm": ("truncate", TruncateConfig),
}
# What a second stage needs beside its method: a first one of the same boundary, and a budget.
SECOND_STAGE = ["isolate.method=ect", "truncate.images=12_800"]


def load(name: str, *overrides: str) -> Recipe:
    """A packaged recipe; those that want real data are told where it would be."""
    needs_path = "path: null" in (ROOT / "configs" / "recipes" / f"{name}.yaml").read_text()
    return load_recipe(name, [*(["data.path=folder"] if needs_path else []), *overrides])


def test_the_packaged_names_are_the_documented_ones():
    assert names("recipes") == sorted([*PAPERS, "cifar10-small", "fashion-mnist", "quickstart"])
    assert names("clusters") == ["auto", "laptop", "one-gpu"]
    assert names("methods") == sorted(MADE_FOR)


@pytest.mark.parametrize(
    ("recipe", "cluster"), list(itertools.product(names("recipes"), names("clusters")))
)
def test_every_recipe_loads_beside_every_cluster(recipe, cluster):
    assert load(recipe).name == recipe
    assert load_cluster(cluster).workers >= 1


@pytest.mark.parametrize("recipe", names("recipes"))
def test_every_recipe_survives_its_resolved_form(recipe, tmp_path):
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(load(recipe)))
    assert load_recipe(str(resolved)) == load(recipe)


@pytest.mark.parametrize("recipe", names("recipes"))
def test_every_recipe_says_what_it_reaches(recipe):
    header = list(
        itertools.takewhile(
            lambda line: line.startswith("#"),
            (ROOT / "configs" / "recipes" / f"{recipe}.yaml").read_text().splitlines(),
        )
    )
    (reached,) = (line for line in header if line.startswith("# Reached:"))
    assert ("NOT RUN HERE" in reached) == (recipe in PAPERS)


def test_a_recipe_that_wants_real_data_says_which_key_gives_it():
    for recipe in set(names("recipes")) - {"quickstart"}:
        with pytest.raises(
            UserError, match=r"data\.path: source \w+ needs one \(data\.path=FOLDER"
        ):
            load_recipe(recipe)


@pytest.mark.parametrize("method", names("methods"))
@pytest.mark.parametrize("recipe", names("recipes"))
def test_every_method_preset_serves_the_section_it_is_for(recipe, method):
    section, cls = MADE_FOR[method]
    rest = SECOND_STAGE if method == "tcm" else []
    config = getattr(load(recipe, f"{section}.method={method}", *rest), section)
    assert config.method == method
    assert type(config) is cls
    assert (config.path == "noise") == (section == "isolate")
    for other in {"distill", "isolate", "truncate"} - {section}:
        refused = rf"override '{other}\.method={method}': {other}\.(path|method): "
        with pytest.raises(UserError, match=refused) as error:
            load(recipe, f"{other}.method={method}")
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("method", names("methods"))
def test_a_method_preset_says_every_part_of_its_method(method):
    """A default that changes must not change a published method."""
    _, cls = MADE_FOR[method]
    written = yaml.safe_load((ROOT / "configs" / "methods" / f"{method}.yaml").read_text())
    parts = {field.name for field in dataclasses.fields(cls)} & METHOD_PARTS
    # A preset names no file; huber_c is of one distance only, which a truncated stage may leave.
    assert set(written) >= parts - {"huber_c", "lpips"}
    if "distance" in parts:
        assert ("huber_c" in written) == (written["distance"] == "pseudo_huber")


def test_quickstart_is_the_measured_recipe():
    recipe = load("quickstart")
    assert [stage.steps for stage in (recipe.teacher, recipe.distill, recipe.isolate)] == [
        600,
        300,
        750,
    ]
    assert recipe.isolate.method == "ict"
    assert not recipe.isolate.uses_teacher
    assert recipe.distill.distance == "squared_l2"
    # A constant 0.998 would keep a fifth of the initial weights after 750 steps (and did).
    assert recipe.isolate.ema[0].name == "power-0.1"


@pytest.mark.parametrize("recipe", names("recipes"))
def test_a_recipe_has_a_canonical_form_with_no_int_where_a_float_is_declared(recipe):
    """1 and 1.0 load to one value but would be two fingerprints."""

    def check(value: object) -> None:
        if isinstance(value, tuple):
            for item in value:
                check(item)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                item = getattr(value, field.name)
                if field.type in (float, float | None):
                    assert type(item) is float or item is None, f"{type(value)}.{field.name}"
                check(item)

    canonical(load(recipe))
    check(load(recipe))


def fields_of(module: object) -> set[tuple[str, str]]:
    classes = [c for c in vars(module).values() if isinstance(c, type)]
    return {
        (c.__name__, field.name)
        for c in classes
        if dataclasses.is_dataclass(c) and c.__module__ == module.__name__
        for field in dataclasses.fields(c)
    }


def test_churn_is_handed_on_whole():
    from consistency.sampling import sample_heun

    fields = {field.name for field in dataclasses.fields(ChurnConfig)}
    assert set(ChurnConfig(S_churn=1.0).arguments()) == fields
    assert fields <= set(inspect.signature(sample_heun).parameters)


@pytest.mark.parametrize(
    "module",
    [consistency.config, consistency.method_config, pipelines.recipe],
    ids=lambda m: m.__name__,
)
def test_every_config_field_is_read_somewhere(module):
    """A key that nothing reads is a lie in every recipe that sets it."""
    read: set[str] = set()
    for package in ("consistency", "pipelines", "infra"):
        for path in (ROOT / package).rglob("*.py"):
            if path.resolve() != Path(module.__file__).resolve():
                tree = ast.parse(path.read_text(encoding="utf-8"))
                for node in ast.walk(tree):
                    if isinstance(node, ast.Attribute):
                        read.add(node.attr)
                    elif isinstance(node, ast.MatchClass):  # case RatioPairs(q=q)
                        read.update(node.kwd_attrs)
    unread = {
        f"{owner}.{name}"
        for owner, name in fields_of(module)
        if name not in read and name not in READ_ELSEWHERE
    }
    assert unread == set()
