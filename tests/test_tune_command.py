"""`cmforge tune` as far as it starts nothing: refusals, --dry-run, --status, --extend."""

from pathlib import Path

import pytest

from infra.errors import UserError
from pipelines import cli, config, tune_command
from pipelines.config import RecipeSource, read_source
from pipelines.sweep import Axis, SweepConfig
from pipelines.tune_command import lockstep_share, refuse_what_cannot_be

ASSETS = Path(__file__).parent / "assets"
TINY, SWEEP = str(ASSETS / "tiny.yaml"), str(ASSETS / "tiny-sweep.yaml")


def sweep(*axes: Axis, **changes: object) -> SweepConfig:
    lr = Axis(key="isolate.lr", range=(1e-4, 1e-2), log=True)
    given = {"allow_rank_deficient": True, **changes}
    return SweepConfig(name="mine", stage="isolate", space=axes or (lr,), **given)  # type: ignore[arg-type]


def source(*overrides: str) -> RecipeSource:
    return read_source(TINY, overrides)


def command(*argv: str) -> int:
    return cli.main(list(argv))


def test_halving_in_lockstep_costs_what_its_rungs_add_up_to():
    # All to 1/9, a third on to 3/9, a ninth on to the end: (1 + 2/3 + 6/9) / 9.
    assert lockstep_share(sweep(probes=9, grace=1, eta=3)) == pytest.approx(7 / 27)
    # All to 1/4, half to 2/4, a quarter to the end.
    assert lockstep_share(sweep(probes=4, grace=1, eta=2)) == pytest.approx(0.5)
    assert lockstep_share(sweep(probes=9, grace=9)) == 1
    assert lockstep_share(sweep(probes=1)) == 1


def test_pbt_is_refused_with_a_reason_for_each_axis():
    s1 = Axis(key="isolate.pairs.levels.s1", choice=("4", "8"))
    method = Axis(key="isolate.method", choice=("ict", "ect"))
    with pytest.raises(UserError) as error:
        refuse_what_cannot_be(sweep(method, s1, scheduler="pbt"), source())
    first, *reasons = str(error.value).splitlines()
    assert "scheduler pbt" in first
    assert "asha, median or none" in first
    assert [line.split(":")[0].strip() for line in reasons] == [
        "isolate.method",
        "isolate.pairs.levels.s1",
    ]


def test_pbt_is_refused_where_all_could_change_because_no_recipe_could_say_its_winner():
    with pytest.raises(UserError, match="a recipe holds one of each key"):
        refuse_what_cannot_be(sweep(scheduler="pbt"), source())


def test_more_looks_than_a_trial_has_steps_are_refused():
    assert refuse_what_cannot_be(sweep(probes=8), source()).valid == 1
    with pytest.raises(UserError, match="probes: 9 looks at the 8 steps of a trial"):
        refuse_what_cannot_be(sweep(probes=9), source())
    with pytest.raises(UserError, match="probes: 8 looks at the 4 steps"):
        refuse_what_cannot_be(sweep(probes=8, budget=0.5), source())


def test_a_budget_below_one_batch_is_refused():
    with pytest.raises(UserError, match=r"budget 0\.1 is too small: .*less than one batch"):
        refuse_what_cannot_be(sweep(probes=1, budget=0.1), source())


def test_a_dry_run_prints_space_combinations_and_cost_and_touches_nothing(tmp_path, capsys):
    workspace = tmp_path / "w"
    argv = ["tune", TINY, "--sweep", SWEEP, "--workspace", str(workspace), "--dry-run"]
    assert command(*argv) == 0
    said = capsys.readouterr().out
    assert "5 trials by random, ASHA from 1/4 of the schedule, one in 2 on; 0 begun" in said
    assert "isolate.init             scratch | teacher | distilled  when isolate.method=ict" in said
    # ict: 3 first weights x 3 s1; ect: 1; times the range of lr.
    assert "10 combinations, times the ranges; all looked at: 10 valid, 0 refused" in said
    assert "cost: 128 images a trial (budget 1), 640 if none stops" in said
    assert "ASHA in lockstep: 50%, 320 images" in said
    assert "FLOP" in said
    assert not workspace.exists()


def test_overrides_reach_the_sweep_and_the_recipe(tmp_path, capsys):
    argv = ["tune", TINY, "--sweep", SWEEP, "--workspace", str(tmp_path / "w"), "--dry-run"]
    assert command(*argv, "sweep.trials=7", "sweep.scheduler=none", "isolate.images=160") == 0
    said = capsys.readouterr().out
    assert "7 trials by random, every trial to its end" in said
    assert "cost: 160 images a trial (budget 1), 1,120 if none stops" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sweep", "isolatoin"], "unknown sweep 'isolatoin', did you mean 'isolation'?"),
        (["sweep.trails=3"], "trails: unknown key, did you mean 'trials'?"),
        (["sweep.trials=0"], "trials: 0 must be >= 1"),
        (["--extend", "0"], "--extend: 0 must be at least 1"),
        (["sweep.scheduler=pbt"], "scheduler pbt moves weights"),
        (["sweep.probes=100"], "probes: 100 looks at the 8 steps"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(tmp_path, capsys, argv, said):
    named = [] if "--sweep" in argv else ["--sweep", SWEEP]
    code = command("tune", TINY, *named, "--workspace", str(tmp_path / "w"), *argv)
    captured = capsys.readouterr()
    assert code == 2
    assert said in captured.err
    assert not (tmp_path / "w" / "steps").exists()


def test_a_sweeps_key_without_a_sweep_is_a_mistake(tmp_path, capsys):
    code = command("plan", TINY, "--workspace", str(tmp_path / "w"), "sweep.trials=3")
    assert code == 2
    assert "sweep.trials=3: is a sweep's, and none is run; add --tune" in capsys.readouterr().err


def test_a_plan_with_tune_has_the_step_before_its_stage(tmp_path, capsys):
    workspace = ["--workspace", str(tmp_path / "w")]
    assert command("plan", TINY, "--tune", "--sweep", SWEEP, *workspace) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows.index("distill") < rows.index("tune-isolate") < rows.index("isolate")
    assert command("plan", TINY, *workspace) == 0
    assert "tune" not in capsys.readouterr().out


def test_status_of_a_sweep_that_never_ran(tmp_path, capsys):
    argv = ["tune", TINY, "--sweep", SWEEP, "--workspace", str(tmp_path / "w"), "--status"]
    assert command(*argv) == 0
    assert "0 of 5 trials over" in capsys.readouterr().out


def test_the_packaged_sweeps_go_with_the_quickstart():
    for name in config.names("sweeps"):
        found = config.load_sweep(name)
        checked = tune_command.refuse_what_cannot_be(found, read_source("quickstart"))
        assert checked.valid == checked.looked_at
