"""The client's logic against an endpoint by design; real engines and their defects are in tests/verify/."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from vllm_deterministic import cli
from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.verify import Report, verify
from vllm_deterministic.verify.families import FAMILIES, REQUIRED
from vllm_deterministic.verify.runner import Plan
from vllm_deterministic.verify.session import EndpointError

HERE = Path(__file__).parent
FEW = ("repeat", "burst", "stream")


def _designed() -> ModuleType:
    spec = spec_from_file_location("designed_endpoint", HERE / "designed_endpoint.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["designed_endpoint"] = module
    spec.loader.exec_module(module)
    return module


designed_endpoint = _designed()
Designed, serving = designed_endpoint.Designed, designed_endpoint.serving


def run(behaviour: object, **options: object) -> Report:
    with serving(behaviour) as endpoint:
        return verify(endpoint.url, **{"level": "quick", "seed": 1, "families": FEW, **options})


def family(report: Report, name: str):
    return next(one for one in report.families if one.name == name)


def test_an_endpoint_that_says_the_same() -> None:
    report = run(Designed(), families=None)
    assert (report.verdict, report.exit_code, report.partial) == ("same", 0, False)
    assert {one.name for one in report.families} == {one.name for one in FAMILIES} - {"against"}
    # What it does not offer is not called the same.
    assert family(report, "scored").verdict == "could not tell"
    assert "prompt logprobs" in family(report, "scored").reason
    assert report.power.comparisons == sum(case.runs - 1 for one in report.families for case in one.cases)
    assert all(case.distinct_answers == 1 for one in report.families for case in one.cases)


@pytest.mark.parametrize(
    ("defect", "found_by"),
    [("neighbours", "burst"), ("stream", "stream"), ("pause", "pause"), ("chat", "chat"), ("choices", "choices")],
)
def test_a_defect_is_found_by_its_family(defect: str, found_by: str) -> None:
    # Long enough that requests meet on a busy machine too.
    report = run(Designed(defect=defect, seconds=0.2), families=(found_by,))
    assert (report.verdict, report.exit_code, report.found_by) == ("differs", 1, [found_by])
    parted = next(case.first_divergence for case in family(report, found_by).cases if case.first_divergence)
    # By design the first five tokens never differ, and rounding does not touch the words.
    assert (parted.field, parted.position >= 5) == (("logprobs", False) if defect == "stream" else ("text", True))


def test_the_same_seed_asks_the_same() -> None:
    first, second, other = (run(Designed(), seed=seed) for seed in (5, 5, 6))

    def prompts(report: Report) -> list[str]:
        return [case.prompt for one in report.families for case in one.cases]

    assert prompts(first) == prompts(second) != prompts(other)


def test_texts_alone_are_compared_where_there_are_no_logprobs() -> None:
    report = run(Designed(logprobs=False, token_ids=False, strict=True), families=(*FEW, "logprobs", "endpoints"))
    assert report.verdict == "same"
    assert not report.endpoint.logprobs
    assert "same text" in report.headline
    assert any("no logprobs" in note for note in report.notes)
    for name in ("logprobs", "endpoints"):
        assert family(report, name).verdict == "could not tell"
    assert all(case.compared == ["text"] for one in report.families for case in one.cases)
    # The same endpoint, with the families it cannot serve required.
    strict = run(Designed(logprobs=False), families=(*FEW, "logprobs"), require=("all",))
    assert (strict.verdict, strict.exit_code) == ("could not tell", 2)


def test_a_chat_only_endpoint() -> None:
    report = run(Designed(completions=False))
    assert report.verdict == "same"
    assert (report.endpoint.completions, report.endpoint.chat) == (False, True)


def test_an_ignored_seed_leaves_greedy_requests() -> None:
    report = run(Designed(seeds=False), families=(*FEW, "choices"))
    assert [case.name for case in family(report, "repeat").cases] == ["greedy"]
    assert "four seeds gave one answer" in family(report, "choices").reason
    assert not report.endpoint.seeds


def test_busy_is_retried_and_no_difference() -> None:
    behaviour = Designed(busy_every=3)
    report = run(behaviour)
    assert report.verdict == "same"
    assert report.retries == behaviour.refused_busy > 5


def test_a_stream_that_breaks_off_is_no_difference() -> None:
    report = run(Designed(breaks_streams=True))
    assert (report.verdict, report.partial) == ("same", False)
    assert family(report, "stream").verdict == "could not tell"
    assert "peer closed connection" in family(report, "stream").reason


def test_a_lost_endpoint_leaves_a_partial_report() -> None:
    report = run(Designed(dies_after=20))
    assert (report.verdict, report.exit_code, report.partial) == ("could not tell", 2, True)
    assert any("went away" in note for note in report.notes)
    # What was compared before is kept.
    assert family(report, "repeat").verdict == "same"


@pytest.mark.parametrize("bound", [{"max_requests": 25}, {"max_seconds": 1.0}], ids=lambda bound: next(iter(bound)))
def test_bounds(bound: dict[str, float]) -> None:
    behaviour = Designed(seconds=0.05)
    start = time.monotonic()
    report = run(behaviour, **bound)
    assert report.partial
    assert report.verdict == "could not tell"
    assert any(next(iter(bound)).replace("_", "-") in note for note in report.notes)
    if "max_requests" in bound:
        assert behaviour.seen == report.requests == bound["max_requests"]
    else:
        assert time.monotonic() - start < 3


def test_fail_fast_ends_at_the_first_difference() -> None:
    report = run(Designed(defect="neighbours", seconds=0.2), families=("repeat", "batch", "burst"), fail_fast=True)
    assert (report.verdict, report.partial) == ("differs", True)
    assert len(report.found_by) == 1


def test_deep_goes_on_until_enough_tokens_were_compared() -> None:
    report = run(Designed(), level="deep", families=("repeat",), tokens=6000)
    case_tokens = sum(case.tokens for case in family(report, "repeat").cases)
    # A round of this family compares 3 kinds x 8 answers x 96 tokens.
    assert case_tokens == 3 * 3 * 8 * 96 >= 6000
    assert len({case.prompt for case in family(report, "repeat").cases}) == 9, "each round asks something new"


def test_rounds_at_once_ask_what_rounds_in_turn_ask() -> None:
    """A first round by itself and two at once; each counts its own requests, of 3 kinds x 8 answers x 96 tokens."""
    asked = {"level": "deep", "families": ("repeat",), "tokens": 3 * 3 * 8 * 96}
    in_turn, at_once = run(Designed(), **{**asked, "tokens": 2 * 3 * 8 * 96}), run(Designed(), parallel=2, **asked)
    assert (at_once.verdict, at_once.partial, at_once.most_in_flight) == ("same", False, 2)
    assert any("2 were asked at once" in note for note in at_once.notes)
    cases, more = ({(case.prompt, case.runs) for case in family(one, "repeat").cases} for one in (in_turn, at_once))
    assert cases <= more
    assert family(at_once, "repeat").requests == 8 * len(more)


def test_rounds_at_once_find_what_differs_and_are_bounded_together() -> None:
    behaviour = Designed(defect="neighbours", seconds=0.05)
    report = run(behaviour, level="deep", families=("repeat",), parallel=3, max_requests=60)
    assert (report.verdict, report.partial, report.requests) == ("differs", True, 60)


def test_deep_ends_where_nothing_can_be_compared() -> None:
    report = run(Designed(), level="deep", families=("scored",))
    assert (report.verdict, report.partial) == ("could not tell", False)


def test_a_key_that_is_withdrawn_leaves_a_partial_report() -> None:
    report = run(Designed(key="k", key_holds_for=30), api_key="k")
    assert (report.verdict, report.partial) == ("could not tell", True)
    assert any("--api-key-env" in note for note in report.notes)


def test_two_endpoints() -> None:
    with serving(Designed()) as first, serving(Designed()) as twin, serving(Designed(salt="other")) as other:
        same = verify(first.url, against=twin.url, level="quick", families=("against",))
        differs = verify(first.url, against=other.url, level="quick", families=("against",))
    assert (same.verdict, differs.verdict) == ("same", "differs")
    assert same.against is not None
    assert {one.endpoint for one in same.latency} == {"first", "second"}


def test_two_fingerprints_side_by_side() -> None:
    """Equal and mixed numerics ids are named beside the verdict; a server without a promise has none."""
    ids = [{"numerics_id": "v1-a", "weights": "w"}, {"numerics_id": "v1-a", "weights": "w"}]
    ids += [{"numerics_id": "v1-b", "weights": "w"}, {}]
    with contextlib.ExitStack() as stack:
        first, *others = (stack.enter_context(serving(Designed(parts=parts))) for parts in ids)
        reports = [verify(first.url, against=one.url, level="quick", families=("against",)) for one in others]
    same, mixed, none = (" ".join(report.notes) for report in reports)
    assert "Both endpoints have the fingerprint vd1-v1-a" in same
    assert "different numerics_id: vd1-v1-a and vd1-v1-b" in mixed
    assert "fingerprint" not in none
    assert [report.against.numerics_id for report in reports if report.against] == ["v1-a", "v1-b", None]


def test_mistakes_say_what_to_change() -> None:
    with serving(Designed(key="secret", models=("a", "b"))) as endpoint:
        with pytest.raises(EndpointError, match="--api-key-env"):
            verify(endpoint.url)
        with pytest.raises(EndpointError, match=r"--model \(a, b\)"):
            verify(endpoint.url, api_key="secret")
        with pytest.raises(EndpointError, match="`c` does not exist"):
            verify(endpoint.url, api_key="secret", model="c")
        with pytest.raises(EndpointError, match="no OpenAI API"):
            verify(endpoint.url.replace("/v1", "/other"), api_key="secret")
        # The URL people paste, with what comes after the base.
        root = endpoint.url.removesuffix("/v1")
        for url in (root, f"{root}/", f"{root}/v1/chat/completions", root.removeprefix("http://")):
            assert verify(url, model="a", api_key="secret", level="quick", families=("stream",)).verdict == "same"
    with pytest.raises(EndpointError, match="cannot reach"):
        verify(endpoint.url)
    with pytest.raises(EndpointError, match="no URL"):
        verify("ftp://x")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "slow"}, "level 'slow' does not exist: quick"),
        ({"families": ("batches",)}, "'batches' does not exist: repeat"),
        ({"families": ("against",)}, "--against URL2"),
        ({"max_requests": 0}, "--max-requests 0"),
        ({"parallel": 2}, "--level deep"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Plan("http://x", **options)  # type: ignore[arg-type]


def test_the_required_families_exist() -> None:
    assert set(REQUIRED) < {one.name for one in FAMILIES}
    assert len({one.name for one in FAMILIES}) == len(FAMILIES)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Designed(defect="stream")) as endpoint:
        folder = tmp_path / "new" / "report"
        options = ["--level", "quick", "--families", "repeat,stream", "--report", str(folder)]
        assert cli.main(["verify", endpoint.url, *options]) == 1
        assert cli.main(["verify", endpoint.url, "--level", "quick", "--families", "repeat", "--quiet"]) == 0
        assert cli.main(["verify", endpoint.url, "--families", "repeat", "--max-requests", "12"]) == 2
    assert cli.main(["verify", endpoint.url]) == 2
    assert cli.main(["verify", endpoint.url, "--api-key-env", "VD_NO_SUCH_VARIABLE"]) == 2
    assert "VD_NO_SUCH_VARIABLE" in capsys.readouterr().err
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert report.found_by == ["stream"]
    assert sorted(path.name for path in folder.iterdir()) == ["junit.xml", "report.html", "report.json"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_a_valid_partial_report(tmp_path: Path) -> None:
    with serving(Designed(seconds=0.05)) as endpoint:
        command = [sys.executable, "-m", "vllm_deterministic.cli", "verify", endpoint.url, "--report", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # A busy machine takes long to start it: a signal before its first question would end another program.
        deadline = time.monotonic() + 240
        while endpoint.seen < 40 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert "interrupted" in out
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert report.partial
    assert "interrupted" in report.notes
    assert "partial" in (tmp_path / "report.html").read_text()


def test_a_key_never_reaches_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VD_TEST_KEY", "sk-very-secret")
    with serving(Designed(key="sk-very-secret")) as endpoint:
        options = ["--level", "quick", "--families", "stream", "--report", str(tmp_path)]
        assert cli.main(["verify", endpoint.url, "--api-key-env", "VD_TEST_KEY", *options]) == 0
    assert all("sk-very-secret" not in path.read_text() for path in tmp_path.iterdir())


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n", "30", "--concurrency", "6", "--tokens", "20", "--report", str(tmp_path)]
    with serving(Designed(defect="neighbours", seconds=0.05)) as endpoint:
        assert cli.main(["demo", endpoint.url, *options]) == 1
    told = json.loads((tmp_path / "demo.json").read_text())
    assert told["answered"] == 30 == sum(one["count"] for one in told["answers"])
    first, *others = [one["parts_at"] for one in told["answers"]]
    assert first is None
    assert others
    assert min(others) == 5
    assert f"{len(told['answers'])} different answers" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "demo.html").read_text()
    with serving() as endpoint:
        assert cli.main(["demo", endpoint.url, *options]) == 0
        assert cli.main(["demo", endpoint.url, "--n", "0"]) == 2


PYTEST_FILE = """
from vllm_deterministic.verify.probes import Endpoint
def test_answer(deterministic_endpoint):
    assert isinstance(deterministic_endpoint, Endpoint)
"""


@pytest.mark.parametrize(("defect", "outcome"), [("", "1 passed"), ("neighbours", "1 error"), (None, "1 skipped")])
def test_pytest_fixture(tmp_path: Path, defect: str | None, outcome: str) -> None:
    (tmp_path / "test_user.py").write_text(PYTEST_FILE)
    with serving(Designed(defect=defect or "", seconds=0.02)) as endpoint:
        said = _pytest(tmp_path, *([] if defect is None else ["--deterministic-url", endpoint.url]))
    assert outcome in said, said
    if defect == "neighbours":
        assert "different answers" in said


def _pytest(folder: Path, *options: str) -> str:
    """What a user's pytest says in a folder of its own."""
    plugin = "vllm_deterministic.verify.pytest_plugin"
    loaded = [] if any(True for _ in _our_entry_points()) else ["-p", plugin]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *loaded, str(folder), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DETERMINISTIC_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return done.stdout + done.stderr


def test_pytest_fixture_takes_a_report_of_the_same_endpoint(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(PYTEST_FILE)
    with serving(Designed()) as endpoint:
        assert cli.main(["verify", endpoint.url, "--level", "quick", "--quiet", "--report", str(tmp_path)]) == 0
        asked, url = endpoint.seen, endpoint.url
        found = [_pytest(tmp_path, "--deterministic-url", one, *VERIFIED) for one in (url, "http://127.0.0.1:1/v1")]
        assert endpoint.seen == asked, "nothing is asked again"
    assert "1 passed" in found[0], found[0]
    assert "1 error" in found[1], found[1]
    assert f"is a report of {url}" in found[1]


VERIFIED = ("--deterministic-verified", "report.json")


def _our_entry_points():
    from importlib.metadata import entry_points

    return (one for one in entry_points(group="pytest11") if one.value == "vllm_deterministic.verify.pytest_plugin")
