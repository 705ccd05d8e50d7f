"""The presets for `vllm serve --config`: vLLM's own parser reads them, and the policy refuses nothing in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from vllm_deterministic.configs import serve_presets

from vllm_deterministic import cli, policy
from vllm_deterministic.contract import CONFIG_KEY

PRESETS = sorted(serve_presets())


@pytest.fixture(scope="module")
def parse():  # type: ignore[no-untyped-def]
    """`vllm serve`'s parser, as vLLM's own command builds it."""
    pytest.importorskip("vllm", reason="presets are read by vLLM's own parser")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return lambda *argv: parser.parse_args(["serve", *argv])


def stated(namespace, tmp_path: Path) -> dict:  # type: ignore[no-untyped-def,type-arg]
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_deterministic.integration.engine import stated_options

    (tmp_path / "config.json").write_text("{}")
    namespace.model = str(tmp_path)
    return stated_options(AsyncEngineArgs.from_cli_args(namespace))


def test_there_are_four() -> None:
    assert PRESETS == ["audit", "latency", "rl", "throughput"]


@pytest.mark.parametrize("name", PRESETS)
def test_vllm_takes_it_and_the_policy_refuses_nothing(parse, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    namespace = parse("MODEL", "--config", str(serve_presets()[name]))
    assert CONFIG_KEY in namespace.additional_config
    options = stated(namespace, tmp_path)
    assert policy.engine_refusals(options) == []
    # Every line of the file has arrived: what it says is what the arguments hold.
    for key, value in yaml.safe_load(serve_presets()[name].read_text()).items():
        assert getattr(namespace, key.replace("-", "_")) == value, key


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_line_wins(parse, name: str) -> None:  # type: ignore[no-untyped-def]
    namespace = parse("MODEL", "--config", str(serve_presets()[name]), "--max-num-seqs", "3", "--dtype", "float32")
    assert (namespace.max_num_seqs, namespace.dtype) == (3, "float32")


def test_latency_and_throughput_differ_in_schedules_only() -> None:
    """No line of either is among the settings that the fingerprint names, so both have one fingerprint."""
    schedules = {"max-num-seqs", "max-num-batched-tokens", "enable-prefix-caching", "stream-interval"}
    some, others = (yaml.safe_load(serve_presets()[name].read_text()) for name in ("latency", "throughput"))
    assert {key for key in {*some, *others} if some.get(key) != others.get(key)} <= schedules


def test_the_control_an_option_off_the_list_is_found(parse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "own.yaml"
    file.write_text("deterministic: true\nspeculative-config: {method: ngram, num_speculative_tokens: 2}\n")
    (refusal,) = policy.engine_refusals(stated(parse("MODEL", "--config", str(file)), tmp_path))
    assert "speculative" in str(refusal)
    file.write_text("deterministic: true\nno-such-option: 1\n")
    with pytest.raises(SystemExit):
        parse("MODEL", "--config", str(file))


def test_the_command_prints_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preset", "audit"]) == 0
    assert Path(capsys.readouterr().out.strip()).samefile(serve_presets()["audit"])
    with pytest.raises(SystemExit):
        cli.main(["preset", "none"])
    assert "latency" in capsys.readouterr().err
