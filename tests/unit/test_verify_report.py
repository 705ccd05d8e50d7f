"""What is computed, drawn and written: power, first divergences, the page, JUnit, files that are whole or not there."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from vllm_deterministic.verify import charts, output, page
from vllm_deterministic.verify.analysis import Case, Observation, case_result, power
from vllm_deterministic.verify.power import detectable_rate, miss_probability, runs_needed
from vllm_deterministic.verify.probes import Answer, Probe
from vllm_deterministic.verify.report import EndpointFacts, FamilyResult, Report, overall

ROOT = Path(__file__).parents[2]
TOKENS = ("the", " sea", " is", " calm")


def answer(tokens: tuple[str, ...] = TOKENS, logprobs: tuple[float, ...] = (-0.5, -1.0, -0.25, -2.0)) -> Answer:
    tops = tuple(((token, value),) for token, value in zip(tokens, logprobs, strict=True))
    return Answer("".join(tokens), (), tokens, logprobs, tops, "length")


OTHER_WORD = answer(("the", " sea", " was", " calm"), (-0.5, -1.0, -0.75, -2.0))
OTHER_BITS = answer(logprobs=(-0.5, -1.0 - 2**-20, -0.25, -2.0))


def result(*answers: Answer, name: str = "greedy"):
    observations = [Observation(f"time {at}", one, 0, 0.1, "first") for at, one in enumerate(answers)]
    return case_result(Case(name, Probe("p", "Hello", seed=3), observations=observations))


def report(*cases, verdict: str | None = None, **changes: object) -> Report:
    told = "differs" if any(case.verdict == "differs" for case in cases) else "same"
    family = FamilyResult(
        name="batch", title="Among neighbours", varies="the neighbours", compares="bits", verdict=verdict or told,
        reason="" if told == "same" and verdict is None else "because", complete=True, seconds=1.5, requests=9,
        cases=list(cases), power=power(cases),
    )  # fmt: skip
    facts = EndpointFacts(
        url="http://127.0.0.1:1/v1", model="m<odel>", server="uvicorn / vllm", completions=True, chat=True,
        logprobs=True, token_ids=True, extensions=True, seeds=True, max_model_len=2048,
    )  # fmt: skip
    values = {
        "version": "0", "started": "2026-11-24T00:00:00+00:00", "seconds": 2.0, "level": "quick", "seed": 1,
        "endpoint": facts, "against": None, "verdict": overall([family], ["batch"]), "headline": "It said & did.",
        "notes": [], "partial": False, "required": ["batch"], "requests": 9, "answers": 4, "neighbours": 5,
        "tokens": 16, "retries": 0, "most_in_flight": 3, "power": power(cases), "power_assumption": "independent",
        "latency": [], "families": [family],
    }  # fmt: skip
    return Report(**{**values, **changes})


def test_power_is_that_of_independent_runs() -> None:
    assert miss_probability(0.01, 0) == 1.0
    assert detectable_rate(0) == 1.0
    for runs in (1, 10, 300, 10**6):
        rate = detectable_rate(runs)
        assert miss_probability(rate, runs) == pytest.approx(0.05, rel=1e-6)
        assert runs_needed(rate) in (runs, runs + 1)
    assert detectable_rate(10**6) == pytest.approx(3e-6, rel=0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        miss_probability(1.5, 3)


def test_power_by_simulation() -> None:
    """The formula against a defect that is thrown with a coin, seen through the comparison itself."""
    rng, rate, runs, trials = random.Random(1), 0.05, 21, 400
    missed = sum(
        result(answer(), *(OTHER_BITS if rng.random() < rate else answer() for _ in range(runs - 1))).verdict == "same"
        for _ in range(trials)
    )
    expected = miss_probability(rate, runs - 1)
    assert abs(missed / trials - expected) < 4 * (expected * (1 - expected) / trials) ** 0.5


def test_groups_and_divergence() -> None:
    case = result(answer(), OTHER_BITS, answer(), OTHER_WORD, OTHER_WORD)
    assert case.groups == [0, 1, 0, 2, 2]
    assert (case.distinct_texts, case.distinct_logprobs, case.distinct_answers) == (2, 3, 3)
    assert case.divergences == [None, 2]
    # The drift ends where the words part; there each token has a logprob of its own.
    assert case.drift == [0.0, 2**-20, 0.0, 0.0]
    assert case.first_divergence is not None
    # A difference in words is shown before one in digits that came earlier.
    assert (case.first_divergence.field, case.first_divergence.position) == ("text", 2)
    assert case.first_divergence.other_condition == "time 3"
    bits = result(answer(), OTHER_BITS).first_divergence
    assert bits is not None
    assert (bits.field, bits.position) == ("logprobs", 1)
    assert "0x1" in bits.reference_value


def test_a_field_that_one_way_of_asking_leaves_out_is_not_compared() -> None:
    bare = Answer("".join(TOKENS), finish_reason="length")
    case = result(answer(), bare)
    assert (case.verdict, case.compared) == ("same", ["text"])
    assert result(answer(), Answer("the sea", finish_reason="length")).verdict == "differs"


def test_one_answer_tells_nothing() -> None:
    assert result(answer()).verdict == "could not tell"
    assert power([result(answer())]).detectable_rate == 1.0


def test_verdict() -> None:
    same, differs = report(result(answer(), answer())), report(result(answer(), OTHER_BITS))
    untold = report(result(answer(), answer()), verdict="could not tell")
    assert [one.exit_code for one in (same, differs, untold)] == [0, 1, 2]
    both = [*same.families, *differs.families]
    assert overall(both, ["batch"]) == "differs"
    assert overall(same.families, ["batch", "prefix"]) == "could not tell"
    assert overall([], []) == "could not tell"


def test_json_keeps_everything_and_follows_the_schema() -> None:
    made = report(result(answer(), OTHER_BITS, OTHER_WORD))
    written = made.model_dump_json()
    assert Report.model_validate_json(written) == made
    jsonschema.validate(json.loads(written), Report.model_json_schema())
    committed = json.loads((ROOT / "docs" / "verify-report.schema.json").read_text())
    assert committed == Report.model_json_schema(), "run scripts/verify-schema"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "made",
    [
        report(result(answer(), answer())),
        report(result(answer(), OTHER_BITS)),
        report(result(answer(), OTHER_WORD, OTHER_BITS), result(answer(), answer(), name="<seeded>")),
        report(result(answer()), verdict="could not tell", partial=True, notes=["interrupted"]),
        report(),
    ],
    ids=["same", "bits", "words", "partial", "empty"],
)
def test_page_is_whole_and_self_contained(made: Report) -> None:
    text = page.render(made)
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.addresses == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert not re.search(r"url\(|@import", text)
    assert "m&lt;odel&gt;" in text
    assert "<odel>" not in text
    assert "It said &amp; did." in text
    assert ("<mark>" in text) == any(case.distinct_texts > 1 for one in made.families for case in one.cases)


def test_page_shows_hostile_text_as_text() -> None:
    evil = answer(("<script>alert(1)</script>", " sea", " is", " calm"))
    text = page.render(report(result(answer(), evil)))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_pictures_draw_what_they_are_given() -> None:
    assert charts.mosaic([0, 0, 1], ["a", "b", "c"]).count("<rect") == 3
    bars = charts.histogram([5, 5, 9], 10, "token")
    assert bars.count('class="bar"') == 2
    assert "2 from token 5" in bars
    assert charts.drift([("a", [0.0, 1e-3, 0.5])], "token").count("<circle") == 3
    assert charts.drift([("a", [0.0])], "token") == ""
    # abc splits from abd at 2, both from xyz at 0: a trunk, a fork, three leaves.
    assert charts.river(["abc", "abd", "xyz"], [5, 2, 1]).count("<rect") == 5
    assert charts.river([[]], [1]) == ""
    many = [f"{number:04}" for number in range(64)]
    assert charts.river(many, [1] * 64)


def test_junit() -> None:
    control = answer(("the", "\x1b", "\ud800", " calm"))
    made = report(result(answer(), answer()), result(answer(), control, name="seeded"), result(answer(), name="one"))
    root = ElementTree.fromstring(output.junit(made).split("\n", 1)[1])
    assert {key: root.get(key) for key in ("tests", "failures", "skipped")} == {
        "tests": "3", "failures": "1", "skipped": "1",
    }  # fmt: skip
    failure = root.find(".//testcase[@name='seeded']/failure")
    assert failure is not None
    assert "2 distinct" in str(failure.get("message"))
    assert "time 1" in str(failure.text)
    untold = ElementTree.fromstring(output.junit(report(verdict="could not tell")).split("\n", 1)[1])
    assert (untold.get("tests"), untold.get("skipped")) == ("1", "1")


WRITE_WITH_A_LIMIT = """
import pathlib, resource, sys
from vllm_deterministic.verify import output
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    output.write_file(pathlib.Path(sys.argv[1]), "x" * 10_000)
except output.OutputError as error:
    print(error)
"""


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    """The kernel refuses further bytes in the middle of a file, as it does on a full disk."""
    target = tmp_path / "report.json"
    target.write_text("old")
    command = [sys.executable, "-c", WRITE_WITH_A_LIMIT, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{target} could not be written: File too large" in done.stdout
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(output.OutputError, match="cannot be written"):
        output.prepare(tmp_path / "file" / "report")
