from __future__ import annotations

import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import EVENT, NOT_COVERED, PLD, risk

from sfumato.errors import InputError
from sfumato.report import Result, render, write_report
from sfumato.report.html import guess_bound, summary, tied

VOID = {"meta", "br", "link", "img", "input", "hr", "base"}


class Page(HTMLParser):
    """Collects what a browser would see: elements, attributes, exact values, and text outside tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def exact(self) -> set[float]:
        return {float(value) for tag, key, value in self.attributes if (tag, key) == ("data", "value")}


def page_of(mapping: dict[str, Any]) -> Page:
    return Page(render(Result.model_validate(mapping)))


def test_nothing_is_fetched_and_nothing_runs(result: Result) -> None:
    text = render(result)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, key, value in page.attributes:
        assert not key.startswith("on")
        assert key not in {"src", "srcset", "action", "background", "poster", "ping"}
        if key.endswith("href"):
            assert value.startswith("#"), (tag, key, value)
        if not key.startswith("xmlns"):
            assert "//" not in value, (tag, key, value)
        assert not re.search(r"url\((?!#)", value)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"@import|@font-face|url\(|//", style)
    policy = [v for t, k, v in page.attributes if (t, k) == ("meta", "content") and "default-src" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]


def test_both_themes_and_print_are_there_and_plots_stay_white(result: Result) -> None:
    text = render(result)
    assert '<meta name="color-scheme" content="light dark">' in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    assert re.search(r"\.plot \{[^}]*background: #fff", text)


def test_the_sections_come_in_order(result: Result) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", render(result)) == [
        "In one paragraph",
        "The promise",
        "What epsilon means",
        "What these numbers do not cover",
        "Accuracy",
        "What was spent when",
        "How to check this yourself",
    ]


def test_every_number_of_every_run_is_on_the_page(result: Result) -> None:
    page = Page(render(result))
    for run in result.runs:
        assert run.name in page.text
        score = run.metrics.accuracy
        assert score is not None
        wanted = {run.seconds, score.mean, score.sd, *score.per_owner.values()}
        if run.privacy:
            p = run.privacy
            assert p.accountants.rdp is not None
            assert p.noise_multiplier is not None
            assert p.clip_norm is not None
            wanted |= {p.epsilon, p.delta, p.accountants.pld, p.accountants.rdp}
            wanted |= {p.noise_multiplier, p.clip_norm, 0.1}
        assert wanted <= page.exact
    assert "sampling poisson, rate 0.1" in page.text
    assert "steps 20 20 20" in page.text


def test_seconds_have_one_decimal(result: Result) -> None:
    assert re.findall(r'<data value="4\.125"[^>]*>(.*?)</data>', render(result)) == ["4.1", "4.1"]


def test_seconds_have_one_decimal_without_accuracy_too(single: dict[str, Any]) -> None:
    single["runs"][0]["seconds"] = 12.3456
    assert re.findall(r'<data value="12\.3456"[^>]*>(.*?)</data>', render(Result.model_validate(single))) == ["12.3"]


def test_no_heading_breaks_before_a_number(result: Result) -> None:
    heads = re.findall(r"<th [^>]*>(.*?)</th>", render(result))
    assert "federated, epsilon\xa00.5" in heads
    assert not [head for head in heads if re.search(r" \d", head)]


@given(st.text(alphabet="ab 0.%,\xa0"))
def test_tied_text_reads_the_same(text: str) -> None:
    assert tied(text).replace("\xa0", " ") == text.replace("\xa0", " ")
    assert not re.search(r" [0-9%]", tied(text))


def test_the_ledger_its_total_and_its_check_are_on_the_page(result: Result) -> None:
    page = Page(render(result))
    assert result.ledger is not None
    for entry in result.ledger.entries:
        assert entry.purpose in page.text
        assert entry.at[:19].replace("T", " ") in page.text
    assert "heart 9 9 0.0006 0.0006" in page.text
    assert f"sfumato ledger verify heart.ledger --digest {result.ledger.digest}" in page.text
    assert "1 row of bookkeeping" in page.text


def test_a_ledger_name_is_quoted_for_the_shell(mapping: dict[str, Any]) -> None:
    mapping["ledger"]["path"] = "heart; rm -rf x"
    assert "sfumato ledger verify 'heart; rm -rf x' --digest" in page_of(mapping).text


def test_a_long_ledger_is_folded(mapping: dict[str, Any]) -> None:
    entries = mapping["ledger"]["entries"]
    assert "All 7 grants and charges" not in page_of(mapping).text
    entries += [entries[1] | {"seq": 100 + i} for i in range(10)]
    assert "All 17 grants and charges" in page_of(mapping).text


HOSTILE = '<script>alert("x")</script><b>&amp;'


def test_hostile_text_stays_text(mapping: dict[str, Any]) -> None:
    calm = page_of(mapping)
    run = mapping["runs"][2]
    for curves in mapping["curves"].values():
        curves[HOSTILE] = curves.pop(run["name"])
    run["name"] = HOSTILE
    run["privacy"] |= {"not_covered": [HOSTILE, *NOT_COVERED], "event": EVENT | {"note": HOSTILE}}
    run["privacy"]["sampling"] = {"kind": HOSTILE, "rate": 0.1}
    mapping["runs"][0]["metrics"]["accuracy"]["per_owner"][HOSTILE] = 0.5
    mapping["title"] = mapping["machine"] = mapping["version"] = HOSTILE
    mapping["dataset"] |= {"name": HOSTILE, "description": HOSTILE}
    mapping["ledger"]["path"] = HOSTILE.replace("/", "")
    mapping["ledger"]["entries"][1] |= {"purpose": HOSTILE, "by": HOSTILE, "run": HOSTILE, "dataset": HOSTILE}
    text = render(Result.model_validate(mapping))
    page = Page(text)
    assert "<script" not in text
    assert not {"script", "b"} & set(page.tags)
    assert set(page.tags) == set(calm.tags)
    assert HOSTILE in page.text


def test_sentences_on_what_is_not_covered_come_once(result: Result) -> None:
    text = render(result)
    for sentence in NOT_COVERED:
        assert text.count(html.escape(sentence)) == 1
    assert "the runs without privacy: alone, pooled, federated" in Page(text).text


def test_the_same_result_gives_the_same_page(mapping: dict[str, Any], result: Result) -> None:
    assert render(Result.model_validate(mapping)) == render(result)


def test_a_single_private_run_without_metrics_reads_well(single: dict[str, Any]) -> None:
    page = page_of(single)
    assert "This page reports one training run. It is private and protects any one record" in page.text
    assert "is right at most 70.5 % of the time, where a coin" in page.text
    assert "No accuracy was measured." in page.text
    assert "No ledger is part of this report." in page.text
    assert "None" not in page.text
    assert "plain sums" not in page.text
    assert "svg" not in page.tags


def test_a_single_run_with_one_seed_reads_well(single: dict[str, Any]) -> None:
    single["runs"][0]["metrics"] = {"accuracy": {"mean": 0.8125, "sd": 0.0, "seeds": 1}}
    page = page_of(single)
    assert 0.8125 in page.exact
    assert "81.2 % – 1" in page.text  # mean, sd, seeds: one seed spreads nowhere
    assert "svg" not in page.tags


def test_a_run_without_privacy_promises_nothing(single: dict[str, Any]) -> None:
    single["runs"][0] |= {"mode": "central", "privacy": None}
    page = page_of(single)
    assert "It is not private: nothing is promised" in page.text
    assert "No run in this report is private." in page.text
    assert "What epsilon means" not in page.text
    assert "There is no private run to check." in page.text


def test_a_silent_run_is_not_taken_for_a_covered_one(single: dict[str, Any]) -> None:
    single["runs"][0]["privacy"]["not_covered"] = []
    assert "The runs name nothing. Ask before you sign" in page_of(single).text


def test_a_missing_second_opinion_and_missing_knobs_are_said(single: dict[str, Any]) -> None:
    single["runs"][0]["privacy"] |= {"noise_multiplier": None, "clip_norm": None, "sampling": None}
    single["runs"][0]["privacy"]["accountants"]["rdp"] = None
    text = page_of(single).text
    assert "ε by RDP accounting no bound noise multiplier – clip norm – sampling – steps 20" in text


@pytest.mark.parametrize(("rdp", "warned"), [(PLD * 0.99, True), (PLD, False), (PLD * 1.1, False)])
def test_contradicting_accountants_are_pointed_out(single: dict[str, Any], rdp: float, warned: bool) -> None:
    single["runs"][0]["privacy"]["accountants"]["rdp"] = rdp
    assert ("contradict each other" in page_of(single).text) == warned


@pytest.mark.parametrize(
    ("relation", "unit", "words"),
    [
        ("add-or-remove-one", "record", "the same data with one record (one row of the data) more or less"),
        ("add-or-remove-one", "client", "with one owner, with every record that owner holds more or less"),
        ("replace-one", "record", "one record (one row of the data) exchanged for any other"),
    ],
)
def test_the_relation_is_told_in_words(single: dict[str, Any], relation: str, unit: str, words: str) -> None:
    single["runs"][0]["privacy"] |= {"relation": relation, "unit": unit}
    text = page_of(single).text
    assert words in text
    assert f"{relation}, per {unit}" in text
    assert ("read “record” as everything" in text) == (unit == "client")
    assert ("already relative to the change" in text) == (relation == "replace-one")


def test_the_summary_names_the_price_between_the_extremes(result: Result) -> None:
    paragraph = " ".join(summary(result))
    assert "9 training runs on the data set “heart”, held by 4 owners" in paragraph
    assert "Of these, 6 are private; each protects any one record" in paragraph
    assert "epsilon between 0.5 and 3 (delta at most 0.0001)" in paragraph
    assert "at most 62.3 % of the time at epsilon 0.5 and 95.3 % at epsilon 3" in paragraph
    assert "Privacy cost between 0.8 and 6.1 percentage points" in paragraph


def test_a_gain_is_not_called_a_cost(mapping: dict[str, Any]) -> None:
    mapping["runs"] = mapping["runs"][1:3]
    mapping["runs"][1]["metrics"]["accuracy"]["mean"] = 0.8512
    del mapping["curves"]
    paragraph = " ".join(summary(Result.model_validate(mapping)))
    assert "Privacy made the result 2.0 percentage points of accuracy higher" in paragraph


def test_releasing_everything_costs_the_sum_over_runs_and_seeds(result: Result) -> None:
    assert "sees all 30 private models behind this page" in Page(render(result)).text
    assert "ε = 45 and δ = 0.003." in Page(render(result)).text.replace(" .", ".")


def test_different_promises_are_not_added(mapping: dict[str, Any]) -> None:
    mapping["runs"][2]["privacy"]["unit"] = "client"
    assert "private models behind this page" not in page_of(mapping).text


@given(st.floats(0, 800), st.floats(0, 1))
def test_the_bound_on_a_guess_is_never_too_small(epsilon: float, delta: float) -> None:
    # The best test is right with probability (e^epsilon + delta) / (1 + e^epsilon).
    best = (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))
    shown = guess_bound(epsilon, delta)
    assert best - 1e-15 <= shown <= min(1.0, best + delta + 1e-12)
    assert 0.5 <= shown <= 1.0


def test_what_attacks_can_do_is_in_the_table_and_in_two_sentences_in_two_languages(result: Result) -> None:
    text = render(result)
    page = Page(text)
    weakest = result.private_runs[2].privacy
    assert weakest is not None
    assert weakest.risk is not None
    assert {weakest.risk.guess, *(found for _, found in weakest.risk.success)} <= page.exact
    assert "For the weakest promise on this page, that of “pooled, epsilon\xa03”: Somebody who knows" in text
    assert "is right at most\xa095.3\xa0% of the time" in text
    assert "finds at most\xa020.1\xa0% of those that were" in text
    (chinese,) = re.findall(r'<p lang="zh">(.*?)</p>', text)
    assert "95.3%" in chinese
    assert "20.1%" in chinese
    assert "no privacy loss distribution" not in page.text


def test_one_run_is_not_called_the_weakest(single: dict[str, Any]) -> None:
    single["runs"][0]["privacy"]["risk"] = risk()
    assert "weakest" not in page_of(single).text


def test_bounds_from_epsilon_and_delta_alone_say_so(single: dict[str, Any]) -> None:
    single["runs"][0]["privacy"]["risk"] = risk() | {"basis": "epsilon-delta"}
    assert "no privacy loss distribution is known for what this run did" in page_of(single).text


def test_a_result_without_risk_has_the_bound_of_epsilon_and_delta(single: dict[str, Any]) -> None:
    page = page_of(single)
    assert guess_bound(PLD, 0.0001) in page.exact
    assert "+ δ" in page.text
    assert "false positives" not in page.text


def test_the_curve_gives_the_summary_its_guess(single: dict[str, Any]) -> None:
    single["runs"][0]["privacy"]["risk"] = risk() | {"guess": 0.5612}
    assert "is right at most 56.2 % of the time" in " ".join(summary(Result.model_validate(single)))


def test_an_event_that_the_public_package_does_not_know_gets_no_script(single: dict[str, Any]) -> None:
    promise = single["runs"][0]["privacy"]
    promise["event"] = {"type": "ComposedDpEvent", "events": [{"type": "RenyiFilterDpEvent", "order": 8, "rdp": 0.1}]}
    promise["accountants"] = {"pld": None, "rdp": promise["epsilon"]}
    page = page_of(single)
    assert "PLDAccountant()" not in page.text
    assert "no such figure for an event of this kind" in page.text
    assert "ε by PLD accounting no bound" in page.text


def test_the_check_on_the_page_recomputes_epsilon(single: dict[str, Any], tmp_path: Path) -> None:
    text = render(Result.model_validate(single))
    event, check = (html.unescape(re.sub(r"<[^>]+>", "", block)) for block in re.findall(r"<pre>.*?</pre>", text, re.S))
    assert json.loads(event) == EVENT
    assert len(check.splitlines()) == 6
    (tmp_path / "event.json").write_text(event, encoding="utf-8")
    answer = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(answer.stdout) == pytest.approx(PLD, rel=1e-3)


def test_the_report_is_written_whole_into_a_new_folder(result: Result, tmp_path: Path) -> None:
    path = write_report(result, tmp_path / "a" / "b")
    assert path == tmp_path / "a" / "b" / "report.html"
    assert path.read_text("utf-8") == render(result)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_file_where_the_folder_should_be_is_refused(result: Result, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(InputError, match="taken cannot be made a folder"):
        write_report(result, tmp_path / "taken")
