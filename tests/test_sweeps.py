"""The packaged sweeps: what they search, and that every recipe can be searched so."""

import math
from pathlib import Path

import pytest

import pipelines.space
from consistency.method_config import (
    ConstantLevels,
    RatioPairs,
    SCMConfig,
    StopGradTarget,
    TargetEMA,
)
from pipelines.config import RecipeSource, load_sweep, names, read_source
from pipelines.space import Space, check, explain_pbt

ROOT = Path(__file__).parent.parent
# By hand. isolation: ict and ct-2023 with 3 inits each: (2 kinds x 2 s0 x 5 s1) grids x (stop_grad
# + 3 mu x 2 adaptive_s0) + 3 N x (stop_grad + 3 mu); ect with 2 inits: 3 + 3 + 2 + 1 (q, stages).
# distillation: cd with 2 solvers: (3 N + 2 kinds x 2 s0 x 3 s1) x (stop_grad + 3 mu); scd: 2
# tangents x 2 warm-ups (and two ranges).
COUNTS = {
    "isolation": 2 * 3 * (20 * 7 + 3 * 4) + 2 * 9,
    "distillation": 2 * (3 + 12) * 4 + 2 * 2,
}


def source(recipe: str, *overrides: str) -> RecipeSource:
    """A packaged recipe; those that want real data are told where it would be."""
    found = read_source(recipe, overrides)
    needs_path = "path: null" in found.text
    return read_source(recipe, [*(["data.path=folder"] if needs_path else []), *overrides])


def test_the_counts_are_those_of_the_packaged_sweeps():
    assert sorted(COUNTS) == names("sweeps")
    for sweep, count in COUNTS.items():
        assert load_sweep(sweep).name == sweep
        assert Space(load_sweep(sweep).space).count() == count


@pytest.mark.parametrize("sweep", names("sweeps"))
def test_every_combination_is_a_valid_quickstart(sweep):
    checked = check(load_sweep(sweep), source("quickstart"))
    assert (checked.valid, checked.looked_at, checked.invalid) == (COUNTS[sweep],) * 2 + ((),)


@pytest.mark.parametrize("sweep", names("sweeps"))
@pytest.mark.parametrize("recipe", sorted(set(names("recipes")) - {"quickstart"}))
def test_every_recipe_can_be_searched(recipe, sweep, monkeypatch):
    """What differs from quickstart is outside the method: a part of the space shows it."""
    monkeypatch.setattr(pipelines.space, "MOST", 60)
    checked = check(load_sweep(sweep), source(recipe))
    assert checked.looked_at == checked.valid == 60


@pytest.mark.parametrize("sweep", names("sweeps"))
def test_a_sweep_leaves_the_recipes_speed_and_length_alone(sweep):
    keys = {axis.key.partition(".")[2] for axis in load_sweep(sweep).space}
    assert keys.isdisjoint({"lr", "batch", "images", "ema", "snapshots", "dropout", "precision"})


@pytest.mark.parametrize("sweep", names("sweeps"))
@pytest.mark.parametrize("recipe", ["quickstart", "imagenet64"])
def test_every_trial_scores_two_power_emas(sweep, recipe):
    """Of two, any length can be rebuilt from snapshots; trial 0, the recipe's own, has them too."""
    config = load_sweep(sweep)
    trial = getattr(source(recipe).recipe(config.fixed), config.stage)
    assert [ema.name for ema in trial.ema] == ["power-0.05", "power-0.1"]


def test_the_isolation_space_is_the_conditional_one_of_the_papers():
    config = load_sweep("isolation")
    base = source("quickstart")
    seen = set()
    for settings in Space(config.space).spread(200):
        trial = base.recipe([*config.fixed, *settings]).isolate
        seen.add((trial.method, trial.init))
        if trial.method == "ect":
            assert isinstance(trial.pairs, RatioPairs)
            assert math.log2(trial.pairs.q) * trial.pairs.stages in (4, 6, 8)  # 1/16, 1/64, 1/256
            assert trial.target == StopGradTarget()
        elif isinstance(trial.target, TargetEMA) and isinstance(trial.pairs.levels, ConstantLevels):
            assert trial.target.adaptive_s0 == 0  # also ct-2023's, whose preset adapts
    methods = [("ict", i) for i in ("scratch", "teacher", "distilled")]
    methods += [("ct-2023", i) for _, i in methods] + [("ect", "teacher"), ("ect", "distilled")]
    assert seen == set(methods)


def test_the_setting_of_the_papers_for_trained_weights_is_in_the_space():
    """Appendix B.3 of Song et al. 2023: N = 120, mu = 0.99, from the teacher."""
    wanted = (
        *("isolate.method=ct-2023", "isolate.init=teacher", "isolate.pairs.levels.kind=constant"),
        *("isolate.pairs.levels.N=120", "isolate.target.kind=ema", "isolate.target.mu=0.99"),
        "isolate.target.adaptive_s0=0",
    )
    assert wanted in set(Space(load_sweep("isolation").space).combinations())


def test_the_distillation_space_asks_the_teacher_in_every_setting():
    config = load_sweep("distillation")
    base = source("quickstart")
    for settings in Space(config.space).combinations():
        trial = base.recipe([*config.fixed, *settings]).distill
        assert trial.uses_teacher
        if isinstance(trial, SCMConfig):
            assert (trial.P_mean, trial.P_std) == (-1.8, 1.2)  # the low ends
        elif isinstance(trial.target, TargetEMA):
            assert trial.target.adaptive_s0 == 0


@pytest.mark.parametrize("sweep", names("sweeps"))
def test_population_based_training_is_refused_with_reasons(sweep):
    config = load_sweep(sweep)
    reasons = explain_pbt(Space(config.space))
    assert f"{config.stage}.method: another objective and networks" in reasons
    levels = [reason for reason in reasons if reason.startswith(f"{config.stage}.pairs.levels.s1:")]
    assert levels == [f"{config.stage}.pairs.levels.s1: N(k) is a function of k/K from the start"]


@pytest.mark.parametrize("sweep", names("sweeps"))
def test_a_sweep_says_what_its_shorter_trials_cost(sweep):
    text = (ROOT / "configs" / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.startswith("# budget: ") for line in header)
    assert load_sweep(sweep).budget == 0.5
    if sweep == "isolation":
        assert f"# {COUNTS[sweep]} settings." in text
