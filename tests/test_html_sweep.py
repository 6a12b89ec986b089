"""The report's section on a sweep: every number, whatever state it is in; text stays text."""

import dataclasses
import math
import re

import pytest

from pipelines import html_page, html_sweep
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, SweepSummary
from tests.sweeps import AXES, EDGES, axis, finalist, ordinary, schedule, summary, trial
from tests.test_report import HOSTILE, Outline

SWEEP = summary(
    AXES,
    trial(0, (9.0, 7.0, 5.0, 4.0), "isolate.init=scratch", "isolate.lr=1"),
    trial(1, (8.0, 6.0, 4.0, 3.25), "isolate.init=teacher", "isolate.lr=10"),
    trial(2, (12.5, 11.0), "isolate.init=teacher", "isolate.lr=20", state=STOPPED),
    trial(3, (math.nan,), "isolate.lr=99", state=FAILED, reason="the loss was not finite"),
    winner=1,
    settings=("isolate.ema=power-0.1", "isolate.init=teacher", "isolate.lr=10"),
    command="cmforge run quickstart --set isolate.init=teacher",
    schedules=(
        schedule(0, N=(10, 20, 40, 80), gap=(0.5, 0.3, 0.2, 0.1)),
        schedule(1, mu=(0.9, 0.9, 0.95, 0.99), gap=(0.5, 0.25, 0.25, 0.125)),
    ),
    finalists=(finalist(1, 3.0, 3.25, 3.5), finalist(0, 4.25)),
)


def said(document: str) -> str:
    return " ".join("".join(Outline(document).text).split())


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, as text."""
    table = document[document.index(f"<h3>{heading}</h3>") :]
    found = re.findall(r"<tr.*?</tr>", table[: table.index("</table>")])[1:]
    return [[said(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in found]


def changed(**fields: object) -> SweepSummary:
    return dataclasses.replace(SWEEP, **fields)  # type: ignore[arg-type]


# --- what it says --------------------------------------------------------------------------------


def test_the_headline_counts_trials_images_and_compares_the_finalists() -> None:
    text = said(html_sweep.section(SWEEP))
    assert "4 trials: 2 completed, 1 stopped, 1 failed. " in text
    assert "saw 11,000 images of the 16,000 that" in text
    assert "69 %" in text
    assert "trial 1, has 3.25 % and the recipe's own setting 4.25 %, both measured again" in text
    assert "running" not in text


def test_without_finalists_readings_of_one_fraction_are_compared() -> None:
    text = said(html_sweep.section(changed(finalists=())))
    assert "trial 1, has 3.25 % and the recipe's own setting 4.00 %. The lowest" in text
    stopped = dataclasses.replace(SWEEP.trials[0], probes=SWEEP.trials[0].probes[:2])
    text = said(html_sweep.section(changed(finalists=(), trials=(stopped, *SWEEP.trials[1:]))))
    assert "trial 1, has 6.00 % and the recipe's own setting 7.00 % at k/K = 0.5." in text


def test_a_recipe_that_failed_or_won_is_said_so() -> None:
    failed = dataclasses.replace(SWEEP.trials[0], probes=(), state=FAILED)
    text = said(html_sweep.section(changed(finalists=(), trials=(failed, *SWEEP.trials[1:]))))
    assert "the recipe's own setting (failed) has no finite distance" in text
    text = said(html_sweep.section(changed(winner=0)))
    assert "The recipe's own setting, trial 0, stands: 4.00 %." in text


def test_the_winners_settings_and_the_command_are_whole() -> None:
    document = html_sweep.section(SWEEP)
    for setting in SWEEP.settings:
        assert f"<li><code>{setting}</code></li>" in document
    assert f"<pre><code>{SWEEP.command}</code></pre>" in document
    assert "Nothing: the recipe as it stands" in html_sweep.section(changed(settings=()))


def test_every_trial_is_a_row_in_ranked_order() -> None:
    document = html_sweep.section(SWEEP)
    found = rows(document, "Every trial")
    assert [row[:-1] for row in found] == [
        ["1 winner", COMPLETED, "1", "4,000", "4.25 %", "3.25 %", "power-0.1", "tpe"],
        ["0", COMPLETED, "1", "4,000", "5.00 %", "4.00 %", "power-0.1", "recipe"],
        ["2", STOPPED, "0.5", "2,000", "12.00 %", "11.00 %", "power-0.1", "tpe"],
        ["3", FAILED, "0.25", "1,000", "not finite", "not finite", "–", "tpe"],
    ]
    table = document[document.index("<h3>Every trial</h3>") : document.index("<h3>Finalists</h3>")]
    assert re.findall(r"<b>(.*?)</b>", table) == ["3.25 %", "4.00 %", "11.00 %", "not finite"]
    assert [row[-1] for row in found] == [
        "init=teacher, lr=10",
        "init=scratch, lr=1",
        "init=teacher, lr=20",
        "lr=99the loss was not finite",
    ]


def test_the_recipe_that_names_no_values_is_not_shown_as_inactive_axes() -> None:
    plain = dataclasses.replace(SWEEP.trials[0], settings=())
    document = html_sweep.section(changed(trials=(plain, *SWEEP.trials[1:])))
    assert rows(document, "Every trial")[1][-1] == "the recipe as it stands"
    assert "own setting, trial 0, its distance alone" in document


def test_finalists_show_every_block_and_their_protocol() -> None:
    first, second = rows(html_sweep.section(SWEEP), "Finalists")
    digests = [f.protocol.digest[:8] for f in SWEEP.finalists]
    assert first == [
        "1 winner",
        "3.25 %",
        "0.25 %",
        "3.00 %, 3.25 %, 3.50 %",
        "power-0.1",
        "2,000 × 3",
        f"fd_domain_2k {digests[0]}",
    ]
    assert second[:4] == ["0", "4.25 %", "–", "4.25 %"]
    assert "Finalists" not in html_sweep.section(changed(finalists=()))


def test_what_is_not_drawn_is_listed() -> None:
    text = said(html_sweep.section(SWEEP))
    assert "Not finite, so not drawn: trial 3 at k/K = 0.25." in text
    assert "Too few trials to say how much each axis matters." in text
    assert "#1 is ranked 1, #0 is ranked 2." in text
    assert "Without N: their pairs come from a ratio r/t, or time is continuous: trial 1." in text
    assert "Without μ: their target is the network itself: trial 0." in text
    unread = (*SWEEP.trials, trial(4, (), state=RUNNING))
    text = said(html_sweep.section(changed(trials=unread)))
    assert "Without any reading: trial 4." in text
    assert "1 failed, 1 running." in text
    odd = (dataclasses.replace(SWEEP.schedules[0], gap=(0.5, math.nan, 0.2, 0.1)),)
    assert "drawn with a hole: trial 0" in said(html_sweep.section(changed(schedules=odd)))


def test_importances_are_drawn_and_what_lacks_one_is_named() -> None:
    axes = (axis("isolate.init", importance=0.7), axis("isolate.lr"))
    axes += (axis("isolate.mu0", importance=math.nan),)
    document = html_sweep.section(changed(axes=axes))
    assert "Importance: isolate.init 70 %" in document
    assert "Too few trials for the importance of isolate.lr." in document
    assert "The importance of isolate.mu0 is not finite." in document


def test_all_seven_drawings_of_a_full_sweep_are_there_and_say_what_they_are() -> None:
    document = html_sweep.section(ordinary())
    labels = re.findall(r'aria-label="(.*?)"', document)
    begin = ("Parallel", "Distance", "Last", "Grid", "Target", "Gap", "Importance")
    assert [label.split()[0].rstrip(":") for label in labels] == list(begin)
    log = [label for label in labels if label.endswith("logarithmic axis")]
    assert document.count("<span>log scale</span>") == len(log)


@pytest.mark.parametrize(("unit", "shown"), [("%", "<b>3.25 %</b>"), ("", "<b>3.25</b>")])
def test_distances_carry_their_unit(unit: str, shown: str) -> None:
    document = html_sweep.section(changed(unit=unit))
    assert shown in document
    assert (" in 2 steps, %" in document) == (unit == "%")


def test_other_numbers_make_another_page() -> None:
    better = trial(1, (8.0, 6.0, 4.0, 1.75), *SWEEP.trials[1].settings)
    document = html_sweep.section(changed(trials=(SWEEP.trials[0], better), finalists=()))
    assert "3.25 %" not in document
    assert document.count("1.75 %") >= 3


# --- whatever comes ------------------------------------------------------------------------------


@pytest.mark.parametrize("sweep", EDGES.values(), ids=EDGES)
def test_any_sweep_has_a_page_that_is_whole_and_asks_nothing_of_any_network(
    sweep: SweepSummary,
) -> None:
    for made in (sweep, dataclasses.replace(sweep, unit="", steps=1, winner=999)):
        document = html_sweep.page(made)
        outline = Outline(document)
        assert document == html_sweep.page(made)
        assert all(source.startswith("data:") for source in outline.sources())
        assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in outline.tags}
        for request in ("http://", "https://", "@import", "url("):
            assert request not in document
        ids = [attrs["id"] for _, attrs in outline.tags if "id" in attrs]
        assert ids == ["sweep-isolate"]
        text = "".join(outline.text)
        assert "None" not in text
        assert not re.search(r"\b(nan|inf)\b", text)
        assert len(document.encode()) < 500_000


@pytest.mark.parametrize("name", ["no trial", "no reading", "all failed", "none finite"])
def test_without_a_finite_distance_nothing_is_recommended(name: str) -> None:
    document = html_sweep.section(EDGES[name])
    assert "there is no winner" in document
    assert EDGES[name].command not in document
    assert document.count("diverged") == (3 if name == "all failed" else 0)
    assert "winner</span>" not in document


def test_hostile_text_stays_text_wherever_it_comes_from() -> None:
    trials = tuple(
        dataclasses.replace(
            t,
            settings=(f"isolate.init={HOSTILE}",),
            origin=t.origin if t.number == 0 else HOSTILE,
            reason=HOSTILE,
            probes=tuple(
                dataclasses.replace(
                    p, readings=tuple(dataclasses.replace(r, ema=HOSTILE) for r in p.readings)
                )
                for p in t.probes
            ),
        )
        for t in SWEEP.trials
    )
    axes = (axis("isolate.init", HOSTILE, "b", importance=0.5), axis(f"isolate.{HOSTILE}"))
    fields = dict.fromkeys(
        ("name", "stage", "recipe", "metric", "search", "scheduler", "command"), HOSTILE
    )
    again = tuple(dataclasses.replace(f, ema=HOSTILE) for f in SWEEP.finalists)
    bad = changed(trials=trials, axes=axes, settings=(HOSTILE,), finalists=again, **fields)
    plain = changed(
        trials=tuple(dataclasses.replace(t, settings=("isolate.init=a",)) for t in trials),
        axes=(axis("isolate.init", "a", "b", importance=0.5), axis("isolate.lr")),
        settings=("isolate.init=a",),
    )
    outline, other = Outline(html_sweep.page(bad)), Outline(html_sweep.page(plain))
    assert [tag for tag, _ in outline.tags] == [tag for tag, _ in other.tags]
    assert not any(name.startswith("on") for _, attrs in outline.tags for name in attrs)
    assert all(source.startswith("data:") for source in outline.sources())
    assert "".join(outline.text).count(HOSTILE) >= 20


def test_a_title_stays_text_and_the_page_refuses_the_network() -> None:
    document = html_page.document(HOSTILE, "<p>body</p>")
    outline = Outline(document)
    assert HOSTILE in outline.text
    assert not {"script", "img"} & {tag for tag, _ in outline.tags}
    policy = next(a for t, a in outline.tags if t == "meta" and "http-equiv" in a)
    assert (policy["content"] or "").startswith("default-src 'none'")
    assert "<main>\n<p>body</p>\n</main>" in document
