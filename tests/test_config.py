"""Loading recipes and clusters: precedence, method presets, and the resolved form."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from consistency.config import ConstantEMA, HalfLifeEMA
from consistency.method_config import (
    ConsistencyConfig,
    ConstantLevels,
    DoublingLevels,
    LognormalPairs,
    MeanFlowConfig,
    RatioPairs,
    SCMConfig,
    SqrtLevels,
    StopGradTarget,
    TargetEMA,
    UniformPairs,
)
from infra.errors import UserError
from pipelines.config import METHOD_PARTS, load_cluster, load_recipe, names, resolved_yaml
from pipelines.recipe import Cluster, DataConfig, Recipe

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


def write(folder: Path, text: str) -> str:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- precedence ----------------------------------------------------------------------------------


def test_the_file_wins_over_the_method_preset_and_the_preset_over_the_default(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL.replace("images: 1_000", "images: 2_000", 1)))
    assert recipe.teacher.images == 2_000
    assert recipe.teacher.lr == 1e-3  # dataclass default
    assert recipe.distill.lr == 4e-4  # preset cd
    assert recipe.distill.pairs == UniformPairs(levels=ConstantLevels(N=18))
    assert recipe.isolate.pairs == LognormalPairs(levels=DoublingLevels(s0=10, s1=1280))
    assert recipe.isolate.ema == (ConstantEMA(beta=0.99993),)
    changed = MINIMAL.replace("method: cd", "method: cd\n  lr: 3e-4\n  target: {mu: 0.9}")
    recipe = load_recipe(write(tmp_path, changed))
    assert recipe.distill.lr == 3e-4
    assert recipe.distill.target == TargetEMA(mu=0.9)  # no kind: the preset's is amended


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("teacher.images=200_000", lambda r: r.teacher.images, 200_000),
        ("teacher.lr=1e-3", lambda r: r.teacher.lr, 1e-3),
        ("teacher.lr=2", lambda r: r.teacher.lr, 2.0),
        ("teacher.lr=1_000.5", lambda r: r.teacher.lr, 1000.5),
        ("teacher.P_mean=-.5", lambda r: r.teacher.P_mean, -0.5),
        ("teacher.flip=true", lambda r: r.teacher.flip, True),
        ("teacher.betas=[0.9, 0.99]", lambda r: r.teacher.betas, (0.9, 0.99)),
        ("network.channel_mult=[1,2]", lambda r: r.network.channel_mult, (1, 2)),
        ("network.attention=[]", lambda r: r.network.attention, ()),
        ("distill.pairs.levels.N=40", lambda r: r.distill.pairs.levels, ConstantLevels(N=40)),
        ("distill.huber_c=0.03", lambda r: r.distill.huber_c, 0.03),
        ("distill.huber_c=null", lambda r: r.distill.huber_c, None),
        ("register.steps=2", lambda r: r.register.steps, 2),
        ("register.model='007'", lambda r: r.register.model, "007"),
        ("isolate.method=ect", lambda r: r.isolate.pairs, RatioPairs()),
        ("isolate.pairs.kind=ratio", lambda r: r.isolate.pairs, RatioPairs()),
        (
            "isolate.pairs={kind: uniform, levels: {N: 40}}",  # levels: the default's kind
            lambda r: r.isolate.pairs,
            UniformPairs(levels=ConstantLevels(N=40)),
        ),
        ("isolate.pairs={kind: ratio, q: 4}", lambda r: r.isolate.pairs, RatioPairs(q=4.0)),
        (
            "teacher.ema=[{kind: half_life, images: 100}, {kind: constant}]",
            lambda r: r.teacher.ema,
            (HalfLifeEMA(images=100), ConstantEMA()),
        ),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(tmp_path, override, read, expected):
    value = read(load_recipe(write(tmp_path, MINIMAL), [override]))
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_is_taken_as_it_stands(tmp_path):
    path = write(tmp_path, MINIMAL)
    for folder in ["s3://bucket/a b#c", "*.png", "@x", "~/data: here", "a=b", "100%"]:
        overrides = ["data.source=npz", f"data.path={folder}"]
        assert load_recipe(path, overrides).data.path == folder


def test_of_two_overrides_of_a_key_the_last_wins(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL), ["teacher.lr=1", "teacher.lr=2", "seed=7"])
    assert recipe.teacher.lr == 2.0
    assert recipe.seed == 7


def test_another_kind_drops_its_siblings_and_the_same_kind_keeps_them(tmp_path):
    own = "method: ict\n  pairs: {P_mean: -0.5, levels: {s1: 20}}"
    path = write(tmp_path, MINIMAL.replace("method: ict", own))
    recipe = load_recipe(path)
    assert recipe.isolate.pairs == LognormalPairs(P_mean=-0.5, levels=DoublingLevels(s1=20))
    recipe = load_recipe(path, ["isolate.pairs.levels.kind=sqrt"])
    assert recipe.isolate.pairs == LognormalPairs(P_mean=-0.5, levels=SqrtLevels())
    recipe = load_recipe(path, ["isolate.pairs.kind=uniform"])
    assert recipe.isolate.pairs == UniformPairs()


def test_another_method_drops_the_old_methods_parts_and_keeps_the_training_keys(tmp_path):
    own = "method: ict\n  pairs: {P_mean: -0.5}\n  huber_c: 0.1\n  lr: 5e-4\n  dropout: 0.1"
    path = write(tmp_path, MINIMAL.replace("method: ict", own))
    assert load_recipe(path).isolate.huber_c == 0.1
    recipe = load_recipe(path, ["isolate.method=ect", "isolate.pairs.q=256"])
    assert recipe.isolate.pairs == RatioPairs(q=256.0)  # P_mean is ect's own again
    assert recipe.isolate.huber_c == 1e-8
    assert recipe.isolate.init == "teacher"
    assert (recipe.isolate.lr, recipe.isolate.dropout) == (5e-4, 0.1)
    # naming the method it already has changes nothing
    assert load_recipe(path, ["isolate.method=ict"]) == load_recipe(path)


def test_method_parts_are_what_the_methods_add_to_training():
    discrete = {"pairs", "distance", "huber_c", "lpips", "weight", "target", "boundary", "guidance"}
    scm = {"P_mean", "P_std", "tangent", "tangent_c", "tangent_norm", "tangent_warmup_images"}
    scm |= {"adaptive_weight", "prior_weight"}
    mean_flow = {"times", "apart", "power", "power_c", "kappa", "label_dropout"}
    truncate = {"of", "sigma_prime", "nu", "loc", "scale", "q", "stage", "k", "b", "max_ratio"}
    truncate |= {"boundary_share", "boundary_weight"}
    assert discrete | scm | mean_flow | truncate | {"kind", "init", "path"} == METHOD_PARTS


def test_a_section_may_come_from_overrides_alone(tmp_path):
    without = MINIMAL.replace("isolate:\n  method: ict\n  images: 1_000\n  batch: 100\n", "")
    overrides = ["isolate.method=ict", "isolate.images=1_000", "isolate.batch=100"]
    recipe = load_recipe(write(tmp_path, without), overrides)
    assert recipe == load_recipe(write(tmp_path, MINIMAL))


# --- names and clusters -------------------------------------------------------------------------


def test_an_unknown_name_lists_the_near_and_the_packaged_ones():
    with pytest.raises(UserError) as error:
        load_recipe("quikstart")
    line = str(error.value)
    assert line.startswith("unknown recipe 'quikstart', did you mean 'quickstart'? (packaged: ")
    assert all(name in line for name in names("recipes"))
    with pytest.raises(UserError, match="unknown cluster 'laptpo', did you mean 'laptop'"):
        load_cluster("laptpo")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("workers=0", "workers: 0 must be >= 1"),
        ("workers=1.5", "workers: expected an integer, got 1.5"),
        ("worker=2", "worker: unknown key, did you mean 'workers'?"),
        ("gpus_per_worker=-1", "gpus_per_worker: -1.0 must be >= 0"),
        ("checkpoints_kept=0", "checkpoints_kept: 0 must be >= 1"),
    ],
)
def test_a_mistake_about_the_cluster_is_one_line(override, line):
    with pytest.raises(UserError) as error:
        load_cluster("laptop", [override])
    assert str(error.value) == f"override {override!r}: {line}"


# --- the resolved form ---------------------------------------------------------------------------


def test_a_windows_bom_and_line_ends_are_fine(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_bytes(MINIMAL.replace("\n", "\r\n").encode("utf-8-sig"))
    assert load_recipe(str(path)).name == "tiny"


def test_the_resolved_recipe_holds_every_key_and_loads_to_itself(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL), ["teacher.lr=1e-5", "isolate.method=ct-2023"])
    again = load_recipe(write(tmp_path, resolved_yaml(recipe)))
    assert again == recipe
    text = resolved_yaml(recipe)
    for field in dataclasses.fields(Recipe):
        assert f"\n{field.name}:" in f"\n{text}"


GUIDED = ["teacher.label_dropout=0.1", "network.class_conditional=true"]
TWO_EMAS = "[{kind: power, sigma_rel: 0.05}, {kind: half_life, images: 7}]"


@pytest.mark.parametrize(
    "overrides",
    [
        ["isolate.method=sct"],
        ["isolate.method=mean-flow", "isolate.times={kind: shared, P_std: 2}"],
        ["isolate.method=mean-flow", "isolate.times.r_mean=-3"],
        ["distill.method=scd", "noise.c_noise=angle", "network.adagn=double_norm"],
        ["isolate.pairs={kind: uniform, levels: {kind: sqrt, s1: 9}}"],
        ["isolate.method=ect-imagenet64", "isolate.pairs.max_ratio=null"],
        ["distill.target={kind: ema, mu: 0.9, adaptive_s0: 3, variant: openai}"],
        ["distill.distance=lpips", "distill.lpips=a b/vgg.pth"],
        ["isolate.method=ect", "truncate.method=tcm", "truncate.images=1_000"],
        [
            *("select_ema={steps: 2, sigma_rel: [0.07]}", f"isolate.ema={TWO_EMAS}"),
            f"distill.ema={TWO_EMAS}",
        ],
        ["evaluate.teacher_churn={S_churn: 40, S_max: 50}", "evaluate.teacher_guidance=2", *GUIDED],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_member_of_every_union_survives_its_resolved_form(tmp_path, overrides):
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides)
    assert recipe != load_recipe(write(tmp_path, MINIMAL))
    assert load_recipe(write(tmp_path, resolved_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("section", "method", "cls"),
    [
        ("isolate", "sct", SCMConfig),
        ("isolate", "mean-flow", MeanFlowConfig),
        ("isolate", "ect", ConsistencyConfig),
        ("distill", "scd", SCMConfig),
    ],
)
def test_a_method_of_another_family_brings_its_whole_composition(tmp_path, section, method, cls):
    """What the file wrote for the old method goes, training keys stay, and back again."""
    file = load_recipe("quickstart")
    switched = load_recipe("quickstart", [f"{section}.method={method}"])
    config = getattr(switched, section)
    preset = load_recipe(
        write(tmp_path, MINIMAL.replace({"isolate": "ict", "distill": "cd"}[section], method))
    )
    assert type(config) is cls
    for name in METHOD_PARTS & {field.name for field in dataclasses.fields(cls)}:
        assert getattr(config, name) == getattr(getattr(preset, section), name), name
    written = getattr(file, section)
    assert (config.images, config.lr, config.ema) == (written.images, written.lr, written.ema)
    again = load_recipe(write(tmp_path, resolved_yaml(switched)), [f"{section}.method={method}"])
    assert again == switched  # naming the method it already has changes nothing


QUICKSTART = load_recipe("quickstart")


@settings(deadline=None, max_examples=40)
@given(
    path=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(
        lambda text: text.strip() == text
    ),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    images=st.integers(min_value=512, max_value=10**18),
)
@example(path="a\x85b\u2028c: d #e\nf", lr=1e-5, images=512)
def test_the_resolved_form_keeps_any_text_and_number(tmp_path_factory, path, lr, images):
    recipe = dataclasses.replace(
        QUICKSTART,
        data=DataConfig(source="npz", path=path),
        teacher=dataclasses.replace(QUICKSTART.teacher, lr=lr, images=images),
        isolate=dataclasses.replace(QUICKSTART.isolate, target=StopGradTarget(), huber_c=lr),
    )
    assert load_recipe(write(tmp_path_factory.mktemp("r"), resolved_yaml(recipe))) == recipe


def test_a_cluster_survives_its_resolved_form(tmp_path):
    cluster = load_cluster("auto", ["address=10.0.0.1:6379", "gpus_per_worker=0.5"])
    path = tmp_path / "cluster.yaml"
    path.write_text(resolved_yaml(cluster))
    assert load_cluster(str(path)) == cluster
    assert isinstance(cluster, Cluster)


def test_reading_a_config_imports_neither_torch_nor_ray_nor_mlflow():
    code = (
        "import sys; from pipelines.config import load_recipe; load_recipe('quickstart');"
        "import pipelines.fingerprint;"
        "print(sorted({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
