"""Strict loading: precedence, method presets, and every mistake at its place in one message."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consistency.config import (
    ConstantEMA,
    ConstantLevels,
    DoublingLevels,
    HalfLifeEMA,
    LognormalPairs,
    RatioPairs,
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


def mistakes(path: str, *overrides: str) -> list[str]:
    """The lines of the error, each without the folder of the file."""
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value).replace(f"{Path(path).parent}/", "").splitlines()


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


def test_method_parts_are_what_a_consistency_config_adds_to_training():
    parts = {"init", "pairs", "path", "distance", "huber_c", "weight", "target"}
    assert parts == METHOD_PARTS


def test_a_section_may_come_from_overrides_alone(tmp_path):
    without = MINIMAL.replace("isolate:\n  method: ict\n  images: 1_000\n  batch: 100\n", "")
    overrides = ["isolate.method=ict", "isolate.images=1_000", "isolate.batch=100"]
    recipe = load_recipe(write(tmp_path, without), overrides)
    assert recipe == load_recipe(write(tmp_path, MINIMAL))


# --- mistakes ------------------------------------------------------------------------------------

REPLACED = [  # text in MINIMAL, what a person wrote instead, the one line they read
    ("images: 1_000", "imgs: 1_000", "3:3: teacher.imgs: unknown key, did you mean 'images'?"),
    ("name: tiny", "name: tiny\nzzz: 1", "2:1: zzz: unknown key (known: name, seed, data, noise"),
    ("batch: 100", "batch: big", "4:10: teacher.batch: expected an integer, got big"),
    ("batch: 100", "batch: 1e2", "4:10: teacher.batch: expected an integer, got 1e2 (write 100)"),
    ("batch: 100", "batch: true", "4:10: teacher.batch: expected an integer, got true"),
    ("batch: 100", "batch: 0144", "4:10: teacher.batch: expected an integer, got 0144"),
    ("batch: 100", "batch: 1:40", "4:10: teacher.batch: expected an integer, got 1:40"),
    ("batch: 100", "batch: '100'", "4:10: teacher.batch: expected an integer, got '100'"),
    ("batch: 100", f"batch: {'9' * 5000}", "4:10: teacher.batch: expected an integer, got 999"),
    ("batch: 100", "batch:", "4:9: teacher.batch: expected an integer, got nothing"),
    ("batch: 100", "batch: [100]", "4:10: teacher.batch: expected an integer, got a list"),
    ("batch: 100", "lr: .nan", "4:7: teacher.lr: expected a finite number, got .nan"),
    ("batch: 100", "lr: nan", "4:7: teacher.lr: expected a finite number, got nan"),
    ("batch: 100", "lr: 1e999", "4:7: teacher.lr: expected a finite number, got 1e999"),
    ("batch: 100", "lr: -1", "4:7: teacher.lr: -1.0 must be > 0"),
    ("batch: 100", "flip: yes", "4:9: teacher.flip: expected true or false, got yes"),
    ("batch: 100", "flip: 1", "4:9: teacher.flip: expected true or false, got 1"),
    ("batch: 100", "betas: [0.9]", "4:10: teacher.betas: expected 2 values, got 1"),
    ("batch: 100", "betas: [0.9, x]", "4:16: teacher.betas[1]: expected a finite number, got x"),
    ("batch: 100", "betas: 0.9", "4:10: teacher.betas: expected a list [..., ...], got 0.9"),
    (
        "batch: 100",
        "optimizer: adan",
        "4:14: teacher.optimizer: expected one of adam, radam, got adan, did you mean 'adam'?",
    ),
    ("batch: 100", "ema: []", "4:8: teacher.ema: needs at least one entry"),
    (
        "batch: 100",
        "ema: [{beta: 0.9}]",
        "4:9: teacher.ema[0].kind: missing, one of constant, half_life, power",
    ),
    (
        "batch: 100",
        "ema: [{kind: half-life}]",
        "4:16: teacher.ema[0].kind: expected one of constant, half_life, power, got half-life, "
        "did you mean 'half_life'?",
    ),
    (
        "batch: 100",
        "ema: [{kind: power, sigma_rel: 0.3}]",
        "4:34: teacher.ema[0].sigma_rel: 0.3 must be in (0, 0.28)",
    ),
    ("batch: 100", "images: 3", "4:3: teacher.images: duplicate key, first at tiny.yaml:3:3"),
    ("  images: 1_000\n", "", "2:1: teacher.images: missing, there is no default"),
    ("teacher:\n  images: 1_000\n  batch: 100\n", "", "1:1: teacher: missing"),
    ("name: tiny\n", "", "1:1: name: missing, there is no default"),
    ("name: tiny", "name: 3", "1:7: name: expected text, got 3 (quote it if it is meant as text)"),
    ("  method: cd\n", "", "5:1: distill.method: missing, one of cd, ct-2023, ect"),
    ("method: cd", "method: cb", "6:11: distill.method: unknown method cb, did you mean 'cd'?"),
    ("method: cd", "method: [cd]", "6:11: distill.method: unknown method a list"),
    ("method: cd", "method: ict", "6:11: distill.path: distillation takes the teacher's ODE step"),
    ("name: tiny", "name: tiny\ndata: 3", "2:7: data: expected a mapping, got 3"),
    (
        "name: tiny",
        "name: tiny\nnoise: {sigma_min: 90}",
        "2:20: noise.sigma_min: 90.0 must be < sigma_max (80.0)",
    ),
    (
        "name: tiny",
        "name: tiny\nnoise: {sigma_max: 0.001}",
        "2:20: noise.sigma_min: 0.002 must be < sigma_max (0.001)",
    ),
    (
        "name: tiny",
        "name: tiny\nnoise: {sigma_max: 0.5}",
        "2:20: evaluate.mid_sigma: 0.821 must lie between",
    ),
    ("name: tiny", "name: tiny\ndata:\n  source: idx", "3:11: data.path: source idx needs one"),
    ("name: tiny", "\tname: tiny", "1:1: not valid YAML: found character '\\t' that cannot start"),
    ("model: tiny", "model: [", "15:1: not valid YAML: "),
    ("model: tiny", "model: &a [*a]", "14:14: not valid YAML: aliases are not supported"),
    ("model: tiny", "model: !!python/name:os.x", "14:10: not valid YAML: tags are not supported"),
    ("model: tiny", "? [a]\n  : b", "14:5: a key must be a word, not a list or mapping"),
    ("model: tiny", "model: tiny\n---\nx: 1", "not valid YAML: but found another document"),
    ("model: tiny", "model: a\x07b", "14:1: not valid YAML: control characters"),
    ("model: tiny", f"model: {'[' * 5000}", "not valid YAML: nested too deeply"),
    (MINIMAL, "", "1:1: expected a mapping (key: value), got nothing"),
    (MINIMAL, "- a\n- b\n", "1:1: expected a mapping (key: value), got a list"),
]


@pytest.mark.parametrize(("old", "new", "line"), REPLACED)
def test_a_mistake_in_the_file_is_one_line_with_its_place(tmp_path, old, new, line):
    assert old in MINIMAL
    lines = mistakes(write(tmp_path, MINIMAL.replace(old, new, 1)))
    assert len(lines) == 1, lines
    assert lines[0].startswith("tiny.yaml:")
    assert line in lines[0]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("teacher.imgs=3", "teacher.imgs: unknown key, did you mean 'images'?"),
        ("techer.images=3", "techer: unknown key, did you mean 'teacher'?"),
        ("teacher.images=x", "teacher.images: expected an integer, got x"),
        ("teacher.images=", "teacher.images: expected an integer, got nothing"),
        ("teacher.lr=-1", "teacher.lr: -1.0 must be > 0"),
        ("teacher.lr=nan", "teacher.lr: expected a finite number, got nan"),
        ("teacher=3", "teacher: expected a mapping, got 3"),
        ("distill=3", "distill: expected a mapping, got 3"),
        ("teacher.ema.beta=1", "teacher.ema: expected a list [..., ...], got a mapping"),
        ("teacher.lr.x=1", "teacher.lr: expected a finite number, got a mapping"),
        ("isolate.method=itc", "isolate.method: unknown method itc, did you mean 'ict'?"),
        ("isolate.method=cd", "isolate.path: isolation training has no teacher in the loss"),
        ("isolate.pairs.levels.s1=3", "isolate.pairs.levels.s1: 3 must be >= s0 (10)"),
        ("noise.sigma_max=0.001", "noise.sigma_min: 0.002 must be < sigma_max (0.001)"),
        ("register.alias=latest", "register.alias: 'latest' is not a legal MLflow alias"),
        ("teacher.ema=[", "not valid YAML: "),
        ("teacher.images", "expected key=value, such as"),
        ("=3", "expected key=value, such as"),
        ("teacher..images=3", "expected key=value, such as"),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_quotes_it(tmp_path, override, line):
    lines = mistakes(write(tmp_path, MINIMAL), override)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"override {override!r}: {line}")


def test_all_mistakes_come_at_once_in_reading_order(tmp_path):
    text = MINIMAL.replace("name: tiny", "name: tiny\nnoise:\n  sigma_min: 90\n  rho: -1")
    text = text.replace("batch: 100", "bacth: 100\n  dropout: 2", 1)
    text = text.replace("method: ict", "method: ict\n  pairs: {kind: uniforn}\n  lr: -1")
    lines = mistakes(write(tmp_path, text), "evaluate.seed=true", "register.stepz=2")
    assert lines == [
        "tiny.yaml:3:14: noise.sigma_min: 90.0 must be < sigma_max (80.0)",
        "tiny.yaml:4:8: noise.rho: -1.0 must be > 0",
        "tiny.yaml:7:3: teacher.bacth: unknown key, did you mean 'batch'?",
        "tiny.yaml:8:12: teacher.dropout: 2.0 must be in [0, 1)",
        "tiny.yaml:15:17: isolate.pairs.kind: expected one of uniform, lognormal, ratio, "
        "got uniforn, did you mean 'uniform'?",
        "override 'evaluate.seed=true': evaluate.seed: expected an integer, got true",
        "override 'register.stepz=2': register.stepz: unknown key, did you mean 'steps'?",
    ]


def test_an_unreadable_field_is_not_reported_again_through_its_default(tmp_path):
    # were source taken for its default `digits`, that would object to the path
    text = MINIMAL.replace("name: tiny", "name: tiny\ndata: {source: floder, path: x}")
    assert mistakes(write(tmp_path, text)) == [
        "tiny.yaml:2:16: data.source: expected one of digits, idx, folder, npz, cifar10, sheets, "
        "got floder, did you mean 'folder'?"
    ]


def test_a_file_that_cannot_be_one_says_so(tmp_path, monkeypatch):
    big, latin, utf16 = (tmp_path / f"{name}.yaml" for name in ("big", "latin", "utf16"))
    big.write_text("#" * 1_000_001)
    latin.write_bytes("name: a\nmodel: Zürich\n".encode("latin-1"))
    utf16.write_text(MINIMAL, encoding="utf-16")
    assert mistakes(str(big)) == ["big.yaml: larger than 1,000,000 bytes, not a recipe"]
    assert mistakes(str(latin))[0].startswith("latin.yaml:2:1: not UTF-8 text")
    assert mistakes(str(utf16))[0].startswith("utf16.yaml:1:1: not UTF-8 text")
    assert "is a folder" in mistakes(str(tmp_path))[0]
    assert "No such file" in mistakes(str(tmp_path / "missing.yaml"))[0]
    monkeypatch.chdir(tmp_path)
    assert "missing.yaml: cannot read the recipe" in mistakes("missing.yaml")[0]


def test_an_unknown_name_lists_the_near_and_the_packaged_ones():
    (line,) = mistakes("quikstart")
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
    overrides = ["distill.pairs.kind=ratio", "distill.pairs.q=3", "distill.path=noise"]
    recipe = load_recipe(write(tmp_path, MINIMAL), ["teacher.lr=1e-5", "isolate.method=ct-2023"])
    again = load_recipe(write(tmp_path, resolved_yaml(recipe)))
    assert again == recipe
    assert mistakes(write(tmp_path, MINIMAL), *overrides)  # what is refused here is refused there
    text = resolved_yaml(recipe)
    for field in dataclasses.fields(Recipe):
        assert f"\n{field.name}:" in f"\n{text}"


@given(
    path=st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(
        lambda text: text.strip() == text
    ),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    images=st.integers(min_value=512, max_value=10**18),
)
def test_the_resolved_form_keeps_any_text_and_number(tmp_path_factory, path, lr, images):
    recipe = load_recipe("quickstart")
    recipe = dataclasses.replace(
        recipe,
        data=DataConfig(source="npz", path=path),
        teacher=dataclasses.replace(recipe.teacher, lr=lr, images=images),
        isolate=dataclasses.replace(recipe.isolate, target=StopGradTarget(), huber_c=lr),
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
