"""The gate as a pure decision: margins in closed form, every reason, and its symmetries."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.gate import Decision, Measurement, Outcome, Rule, Standing, decide, differences

PROTOCOL = {"extractor": "inception_fid", "samples": 50_000, "seed_blocks": 3, "steps": 1}
RULE = Rule(max_distance=None, allow_proxy=False)


def standing(version: int, *values: float, **changes: Any) -> Standing:
    blocks = changes.pop("seed_blocks", len(values))
    given = {
        "name": "fid50k",
        "unit": "",
        "protocol": {**PROTOCOL, "seed_blocks": blocks},
        "secondary": {},
    }
    return Standing(version=version, values=values, **{**given, **changes})


def judged(candidate: Standing, champion: Standing | None, rule: Rule = RULE) -> Decision:
    return decide(candidate, champion, rule, model="digits", alias="champion")


# --- the margin ----------------------------------------------------------------------------------

SPREAD = standing(1, 3.0, 4.0, 5.0)  # mean 4, standard deviation 1 with n - 1
FLAT = standing(1, 4.0, 4.0, 4.0)  # no spread: the margin is 0.04


@pytest.mark.parametrize(
    ("values", "champion", "outcome", "margin"),
    [
        # Both have standard deviation 1: the margin is 2.
        ((0.9, 1.9, 2.9), SPREAD, "champion", "2"),
        ((1.1, 2.1, 3.1), SPREAD, "challenger", "2"),
        ((4.9, 5.9, 6.9), SPREAD, "challenger", "2"),
        ((5.1, 6.1, 7.1), SPREAD, "refused", "2"),
        # One of them has: 2 * sqrt(1 / 2).
        ((2.5, 2.5, 2.5), SPREAD, "champion", "1.414"),
        ((2.6, 2.6, 2.6), SPREAD, "challenger", "1.414"),
        ((5.4, 5.4, 5.4), SPREAD, "challenger", "1.414"),
        ((5.5, 5.5, 5.5), SPREAD, "refused", "1.414"),
        # Standard deviations 1 and 3: 2 * sqrt(5).
        ((3.0, 6.0, 9.0), SPREAD, "challenger", "4.472"),
        # 1 % of the champion's 4, not of the candidate's.
        ((3.959, 3.959, 3.959), FLAT, "champion", "0.04"),
        ((3.961, 3.961, 3.961), FLAT, "challenger", "0.04"),
        ((4.039, 4.039, 4.039), FLAT, "challenger", "0.04"),
        ((4.041, 4.041, 4.041), FLAT, "refused", "0.04"),
        ((4.0, 4.0, 4.0), FLAT, "challenger", "0.04"),
    ],
)
def test_the_margin_is_two_pooled_deviations_or_one_percent(
    values: tuple[float, ...], champion: Standing, outcome: Outcome, margin: str
) -> None:
    decision = judged(standing(2, *values), champion)
    assert decision.outcome == outcome
    assert f"the margin of {margin}" in decision.reason
    assert "seed block" not in decision.reason


@pytest.mark.parametrize(
    ("value", "outcome"), [(98.9, "champion"), (99.1, "challenger"), (101.1, "refused")]
)
def test_one_seed_block_has_the_floor_alone_and_says_so(value: float, outcome: Outcome) -> None:
    decision = judged(standing(2, value), standing(1, 100.0))
    assert decision.outcome == outcome
    assert (
        "the margin of 1 (1 % of version 1's; the spread of one seed block is unknown)"
        in decision.reason
    )


def test_the_reasons_name_numbers_unit_and_both_versions() -> None:
    proxy = {"name": "fd_domain_2k", "unit": "%"}
    rule = Rule(max_distance=None, allow_proxy=True)

    def reason(*values: float, **changes: Any) -> str:
        champion = standing(1, 3.0, 4.0, 5.0, **changes)
        return judged(standing(2, *values, **changes), champion, rule).reason

    assert reason(0.5, 1.5, 2.5) == (
        "version 2 is champion: fid50k 1.5 beats 4 of version 1 by 2.5, more than the margin of 2"
    )
    assert reason(0.5, 1.5, 2.5, **proxy) == (
        "version 2 is champion by a proxy: fd_domain_2k 1.50 % beats 4.00 % of version 1 by "
        "2.50 %, more than the margin of 2.00 %"
    )
    assert reason(5.5, 6.5, 7.5, **proxy) == (
        "version 2 is refused by a proxy: fd_domain_2k 6.50 % is worse than 4.00 % of version 1 by "
        "2.50 %, more than the margin of 2.00 %"
    )
    assert reason(3.5, 4.5, 5.5, **proxy) == (
        "version 2 is a challenger by a proxy: fd_domain_2k 4.50 % and 4.00 % of version 1 differ "
        "by 0.50 %, within the margin of 2.00 %, and nothing secondary is better"
    )
    assert judged(standing(1, 0.05, **proxy), None, rule).reason == (
        "version 1 is champion by a proxy: the first one (fd_domain_2k 0.05 %)"
    )
    other = decide(standing(2, 1.0), standing(1, 9.0), RULE, model="digits", alias="production")
    assert other.reason.startswith("version 2 is production: ")


# --- what is needed ------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BOUND = Rule(max_distance=2.0, allow_proxy=True)


@pytest.mark.parametrize("champion", [None, standing(1, 9.0, 9.0, 9.0)])
@pytest.mark.parametrize(
    ("candidate", "rule", "says"),
    [
        (standing(2, seed_blocks=3), RULE, "0 of 3 seed blocks have a value"),
        (standing(2, 1.0, 1.0, seed_blocks=3), RULE, "2 of 3 seed blocks have a value"),
        (standing(2, 1.0, NAN, 1.0), RULE, "its distance is not finite"),
        (standing(2, 1.0, -INF, 1.0), RULE, "its distance is not finite"),
        (standing(2, 1.0, 1.0, 1.0, secondary={"kid": NAN}), RULE, "its kid is not finite"),
        (standing(2, 1.5, 2.0, 2.6), BOUND, "fid50k 2.033 is above max_distance 2"),
        (
            *(standing(2, 3.0, 3.0, 3.0, name="fd_domain_2k", unit="%"), BOUND),
            "version 2 is refused by a proxy: fd_domain_2k 3.00 % is above max_distance 2 %",
        ),
    ],
)
def test_what_is_refused_whoever_is_champion(
    candidate: Standing, rule: Rule, says: str, champion: Standing | None
) -> None:
    decision = judged(candidate, champion, rule)
    assert decision.outcome == "refused"
    assert decision.reason.startswith("version 2 is refused")
    assert decision.reason.endswith(says)


def test_the_bound_is_on_the_mean_and_may_be_reached() -> None:
    assert judged(standing(1, 1.0, 2.0, 3.0), None, BOUND).outcome == "champion"


@pytest.mark.parametrize("champion", [None, standing(1, 9.0, 9.0, 9.0, name="fd_domain_2k")])
def test_a_proxy_gates_only_when_the_recipe_allows_it(champion: Standing | None) -> None:
    candidate = standing(2, 1.0, 1.0, 1.0, name="fd_domain_2k")
    assert judged(candidate, champion) == Decision(
        "no decision",
        "no decision on version 2: fd_domain_2k 1, and a proxy does not gate unless "
        "register.allow_proxy is true",
    )
    allowed = judged(candidate, champion, Rule(max_distance=None, allow_proxy=True))
    assert allowed.outcome == "champion"
    assert "version 2 is champion by a proxy" in allowed.reason


MEND = (
    "; register version 1 again under this recipe, or compare with: cmforge compare "
    "models:/digits@champion models:/digits/2"
)


@pytest.mark.parametrize(
    ("champion", "says"),
    [
        (standing(1, seed_blocks=3), "it has no recorded values to compare with"),
        (standing(1, 9.0, 9.0, 9.0, protocol={}), "it has no recorded values to compare with"),
        (standing(1, 9.0, NAN, 9.0), "its distance is not finite"),
        (standing(1, 9.0, 9.0, seed_blocks=3), "it has a value of 2 of 3 seed blocks"),
        (
            standing(1, 9.0, 9.0, 9.0, protocol={**PROTOCOL, "samples": 2_000, "steps": 2}),
            "versions 2 and 1 are measured differently (samples: 50000 and 2000, steps: 1 and 2)",
        ),
        (
            standing(1, 9.0, seed_blocks=1),
            "versions 2 and 1 are measured differently (seed_blocks: 3 and 1)",
        ),
        (
            standing(1, 9.0, 9.0, 9.0, unit="%"),
            "versions 2 and 1 are measured differently (unit: none and %)",
        ),
        (
            standing(1, 9.0, 9.0, 9.0, name="fid_5k"),
            "versions 2 and 1 are measured differently (metric: fid50k and fid_5k)",
        ),
    ],
)
def test_what_is_not_known_of_the_champion_is_never_a_pass(champion: Standing, says: str) -> None:
    head = "no decision on version 2, version 1 stays champion: "
    expected = Decision("no decision", head + says + MEND)
    assert judged(standing(2, 1.0, 1.0, 1.0), champion) == expected


def test_every_field_of_the_protocol_makes_numbers_incomparable() -> None:
    champion = standing(1, 9.0, 9.0, 9.0)
    candidate = standing(2, 1.0, 1.0, 1.0)
    assert judged(candidate, champion).outcome == "champion"
    for key in PROTOCOL:
        for protocol in (
            {**PROTOCOL, key: "other"},
            {k: v for k, v in PROTOCOL.items() if k != key},
        ):
            changed = dataclasses.replace(champion, protocol=protocol)
            assert judged(candidate, changed).outcome == "no decision"
            assert [text.split(":")[0] for text in differences(candidate, changed)] == [key]
    assert differences(candidate, champion) == []


def test_a_field_that_one_side_does_not_know_differs_and_digests_are_cut_short() -> None:
    one = standing(1, 1.0, protocol={"seed_blocks": 1, "weights": "a" * 64, "engine": None})
    other = dataclasses.replace(one, protocol={"seed_blocks": 1, "weights": "b" * 64})
    expected = [f"weights: {'a' * 12} and {'b' * 12}", "engine: None and unknown"]
    assert differences(one, other) == expected
    assert differences(other, one)[-1] == "engine: unknown and None"


# --- the champion evaluated anew -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "rule", "reason"),
    [
        (standing(1, 3.0), RULE, "version 1 already is champion (fid50k 3)"),
        (
            *(standing(1, 3.0, name="fd_domain_2k", unit="%"), BOUND),
            "version 1 is still champion, which nothing replaces, although fd_domain_2k 3.00 % is "
            "above max_distance 2 %",
        ),
        (
            *(standing(1, NAN), RULE),
            "version 1 is still champion, which nothing replaces, although its distance is not "
            "finite",
        ),
        (
            *(standing(1, 1.0, name="fd_domain_2k", unit="%"), RULE),
            "version 1 is still champion, which nothing replaces, although fd_domain_2k 1.00 %, "
            "and a proxy does not gate unless register.allow_proxy is true",
        ),
        (
            *(standing(1, 1.0, name="fd_domain_2k", unit="%"), BOUND),
            "version 1 already is champion by a proxy (fd_domain_2k 1.00 %)",
        ),
    ],
)
def test_the_gate_never_takes_the_alias_without_a_successor(
    candidate: Standing, rule: Rule, reason: str
) -> None:
    before = standing(1, 0.1, protocol={})  # whatever is recorded of it
    assert judged(candidate, before, rule) == Decision("champion", reason)


# --- secondary measures --------------------------------------------------------------------------

KNOWN = {"kid": 2.0, "inception_score": 9.0, "recall": 0.60, "evaluations": 2.0}


def tie(changes: dict[str, float], champion: dict[str, float] = KNOWN) -> Decision:
    """Two versions within the margin; `changes` of the champion's secondary measures."""
    mine = standing(2, 4.0, 4.0, 4.0, secondary={**champion, **changes})
    return judged(mine, standing(1, 4.0, 4.0, 4.0, secondary=champion))


@pytest.mark.parametrize(
    ("changes", "outcome", "says"),
    [
        ({}, "challenger", "and nothing secondary is better"),
        (
            *({"kid": 1.9}, "champion"),
            "but its kid 1.9 is better than 2, and nothing secondary is worse",
        ),
        ({"kid": 1.99}, "challenger", "nothing secondary is better"),  # within 1 %
        ({"kid": 2.1}, "challenger", "and its kid 2.1 is worse than 2"),
        ({"evaluations": 1.0}, "champion", "its evaluations 1 is better than 2"),
        ({"inception_score": 9.2}, "champion", "its inception_score 9.2 is better than 9"),
        ({"inception_score": 8.8}, "challenger", "its inception_score 8.8 is worse than 9"),
        ({"recall": 0.63}, "champion", "its recall 0.63 is better than 0.6"),
        ({"recall": 0.61}, "challenger", "nothing secondary is better"),
        ({"recall": 0.57}, "challenger", "its recall 0.57 is worse than 0.6"),
        ({"kid": 1.0, "recall": 0.59}, "champion", "its kid 1 is better"),
        ({"kid": 1.0, "recall": 0.57}, "challenger", "its recall 0.57 is worse than 0.6"),
        ({"latency": 1.0}, "challenger", "nothing secondary is better"),  # known of one alone
    ],
)
def test_within_the_margin_a_secondary_must_be_better_and_none_worse(
    changes: dict[str, float], outcome: Outcome, says: str
) -> None:
    decision = tie(changes)
    assert decision.outcome == outcome
    assert decision.reason.endswith(says) or f", but {says}" in decision.reason


@pytest.mark.parametrize("key", ["recall", "precision", "density", "coverage", "inception_score"])
def test_of_these_more_is_better(key: str) -> None:
    assert tie({key: 0.9}, {key: 0.5}).outcome == "champion"
    assert tie({key: 0.5}, {key: 0.9}).outcome == "challenger"


def test_one_percent_is_the_same_step_from_either_side() -> None:
    """Each has one that is better by 1 % of the smaller value, but not of the larger."""
    one, other = {"kid": -1.0, "latency": -0.99005}, {"kid": -0.99005, "latency": -1.0}
    assert tie(one, other).outcome == tie(other, one).outcome == "challenger"
    assert "nothing secondary is better" in tie(one, other).reason


def test_a_champion_whose_secondary_is_not_finite_says_nothing_by_it() -> None:
    assert tie({"kid": 1.0}, {"kid": NAN}).outcome == "challenger"


@pytest.mark.parametrize(
    ("mine", "theirs", "outcome"),
    [
        (0.59, 0.60, "champion"),
        (0.57, 0.60, "challenger"),
        (None, 0.60, "challenger"),  # what the champion has may not go unmeasured
        (0.10, None, "champion"),
        (0.10, NAN, "champion"),
        (None, NAN, "champion"),
    ],
)
def test_a_better_distance_may_not_cost_recall(
    mine: float | None, theirs: float | None, outcome: Outcome
) -> None:
    def known(recall: float | None) -> dict[str, float]:
        return {"kid": 1.0} if recall is None else {"kid": 1.0, "recall": recall}

    candidate = standing(2, 1.0, 1.0, 1.0, secondary=known(mine))
    decision = judged(candidate, standing(1, 4.0, 4.0, 4.0, secondary=known(theirs)))
    assert decision.outcome == outcome
    assert decision.reason.startswith("version 2 is ")
    assert "fid50k 1 beats 4 of version 1 by 3, more than the margin of 0.04" in decision.reason
    assert (", but its recall" in decision.reason) is (outcome == "challenger")


def test_a_worse_kid_does_not_undo_a_clearly_better_distance() -> None:
    candidate = standing(2, 1.0, secondary={"kid": 9.0})
    assert judged(candidate, standing(1, 4.0, secondary={"kid": 1.0})).outcome == "champion"


# --- properties ----------------------------------------------------------------------------------

blocks = st.integers(1, 4)
positive = st.floats(1e-3, 1e3)


def record(version: int, count: int, values: st.SearchStrategy[float] = positive):
    """Standings of `count` blocks, whose values may or may not be near each other."""
    near = st.tuples(values, st.lists(st.floats(0.99, 1.01), min_size=count, max_size=count))
    lists = st.one_of(
        near.map(lambda pair: [pair[0] * factor for factor in pair[1]]),
        st.lists(values, min_size=count, max_size=count),
    )
    secondary = st.dictionaries(st.sampled_from(sorted(KNOWN)), st.floats(-2, 2))
    return st.builds(lambda v, s: standing(version, *v, secondary=s), lists, secondary)


pairs = blocks.flatmap(lambda count: st.tuples(record(1, count), record(2, count)))


@given(pairs, st.integers(-30, 30))
def test_the_scale_of_the_metric_changes_nothing(
    pair: tuple[Standing, Standing], exponent: int
) -> None:
    def scaled(one: Standing) -> Standing:
        return dataclasses.replace(one, values=tuple(v * 2.0**exponent for v in one.values))

    champion, candidate = pair
    outcome = judged(candidate, champion).outcome
    assert judged(scaled(candidate), scaled(champion)).outcome == outcome


@given(pairs)
def test_of_two_versions_at_most_one_takes_the_alias_from_the_other(
    pair: tuple[Standing, Standing],
) -> None:
    one, other = pair
    outcomes = judged(one, other).outcome, judged(other, one).outcome
    assert outcomes != ("champion", "champion")
    assert "no decision" not in outcomes


@given(pairs, st.randoms(use_true_random=False))
def test_the_order_of_the_seed_blocks_changes_nothing(
    pair: tuple[Standing, Standing], random: Any
) -> None:
    def shuffled(one: Standing) -> Standing:
        return dataclasses.replace(one, values=tuple(random.sample(one.values, len(one.values))))

    champion, candidate = pair
    assert judged(shuffled(candidate), shuffled(champion)) == judged(candidate, champion)


@given(pairs, st.floats(1e-3, 1))
def test_a_better_distance_never_worsens_the_outcome(
    pair: tuple[Standing, Standing], factor: float
) -> None:
    """All blocks lower by the same number, so the margin stays."""
    rank = {"refused": 0, "challenger": 1, "champion": 2}
    champion, candidate = pair
    candidate, champion = (dataclasses.replace(s, secondary={}) for s in (candidate, champion))
    lower = tuple(v - factor for v in candidate.values)
    better = dataclasses.replace(candidate, values=lower)
    assert rank[judged(better, champion).outcome] >= rank[judged(candidate, champion).outcome]


@given(st.lists(st.floats(1e150, 1e300), min_size=3, max_size=3))
def test_huge_values_do_not_overflow(values: list[float]) -> None:
    assert judged(standing(2, *values), standing(1, 1.0, 1.0, 1.0)).outcome in (
        "refused",
        "challenger",
    )


def test_only_a_metric_that_is_called_fid_is_no_proxy() -> None:
    def proxy(name: str) -> bool:
        return Measurement(name=name, unit="", values=(), protocol={}, secondary={}).is_proxy

    assert not proxy("fid50k")
    assert not proxy("fid_5k")
    assert all(map(proxy, ("fd_inception_fid_50k", "fd_domain_2k", "fd_squeezenet11_10k", "")))


@pytest.mark.parametrize(("mine", "outcome"), [(4.0, "challenger"), (1.0, "champion")])
def test_a_secondary_measure_counts_beyond_its_own_spread(mine: float, outcome: str) -> None:
    """KID's spread over subsets is many times one percent of it; its standard deviation, and how
    well a line fitted, are no measures of a model."""
    champion = standing(1, 4.0, 4.0, secondary={"kid": 5.0, "kid_std": 2.0, "fd_infinity_r2": 0.9})
    candidate = standing(
        2, 4.0, 4.0, secondary={"kid": mine, "kid_std": 1.0, "fd_infinity_r2": 0.5}
    )
    decision = judged(candidate, champion)
    assert decision.outcome == outcome
