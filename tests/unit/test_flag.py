"""The flag on vLLM's real parser: merges, refusals, and no trace where it is not given."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_deterministic.contract import CONFIG_KEY

vllm = pytest.importorskip("vllm", reason="the flag is an option of vLLM's own parser")


@pytest.fixture(scope="module")
def parser():  # type: ignore[no-untyped-def]
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.fixture(scope="module")
def parse(parser):  # type: ignore[no-untyped-def]
    return lambda *argv: parser.parse_args(list(argv))


def settings(namespace) -> object:  # type: ignore[no-untyped-def]
    return (namespace.additional_config or {}).get(CONFIG_KEY)


def test_the_flag_travels_in_additional_config(parse) -> None:  # type: ignore[no-untyped-def]
    assert settings(parse("--deterministic")) == {"numerics": "v1", "unseeded": "derived"}


def test_without_the_flag_nothing_is_written(parse) -> None:  # type: ignore[no-untyped-def]
    assert parse().additional_config in (None, {})


@pytest.mark.parametrize("argv", [[], ["--deterministic"], ["--middleware", "users.own"]])
def test_demands_are_read_with_and_without_the_flag(parse, argv: list[str]) -> None:  # type: ignore[no-untyped-def]
    middleware = parse(*argv).middleware
    assert [name.rsplit(".", 1)[1] for name in middleware] == ["own"] * ("users.own" in argv) + ["Contract"]


def test_the_options_have_a_group_of_their_own(parser) -> None:  # type: ignore[no-untyped-def]
    """`vllm serve --help=all` shows it."""
    (group,) = (group for group in parser._action_groups if group.title == "Deterministic serving")
    names = [action.option_strings[0] for action in group._group_actions]
    assert names[0] == "--deterministic"
    assert names == [name for name in parser._option_string_actions if name.startswith("--deterministic")]


@pytest.mark.parametrize("flag_first", [True, False])
def test_merges_with_additional_config_in_either_order(parse, flag_first: bool) -> None:  # type: ignore[no-untyped-def]
    argv = [["--deterministic"], ["--additional-config", '{"mine": 1}']]
    namespace = parse(*(word for part in (argv if flag_first else argv[::-1]) for word in part))
    assert namespace.additional_config["mine"] == 1
    assert settings(namespace) is not None


def test_config_file(parse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "serve.yaml"
    file.write_text("deterministic: true\ndeterministic-unseeded: random\nadditional-config: '{\"mine\": 2}'\n")
    namespace = parse("--config", str(file))
    assert namespace.additional_config == {"mine": 2, CONFIG_KEY: {"numerics": "v1", "unseeded": "random"}}
    assert any("SeedHeader" in name for name in namespace.middleware)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--deterministic=yes"], "takes no value"),
        (["some-model", "--deterministic", "yes"], "takes no value"),
        (["--deterministic", "--deterministic-numerics", "v9"], "'v9' does not exist; this version knows v1"),
        (["--deterministic", "--deterministic-unseeded", "maybe"], "derived, random"),
        (["--deterministic-numerics", "v1"], "needs --deterministic"),
        (["--deterministic-signing-key", "key.pem"], "--deterministic-signing-key needs --deterministic"),
        (["--deterministic", "--deterministic-signing-key", "no.pem"], "--deterministic-signing-key no.pem"),
        (["--deterministic", "--deterministic-date", "today"], "YYYY-MM-DD"),
        (["--deterministic", "--grpc"], "gRPC"),
        (["--deterministic", "--tool-call-parser", "xlam"], "xlam: this parser is not proved. Proved: hermes"),
        (["--deterministic", "--tool-parser-plugin", "mine.py"], "--tool-parser-plugin mine.py"),
        (["--deterministic-self-check", "5"], "--deterministic-self-check needs --deterministic"),
        (["--deterministic", "--deterministic-self-check", "0"], "minutes above 0"),
        (["--deterministic", "--deterministic-self-check", "nan"], "minutes above 0"),
        (["--deterministic", "--deterministic-self-check-stop"], "needs --deterministic-self-check MINUTES"),
        (
            "--deterministic --deterministic-self-check 5 --deterministic-self-check-stop --api-server-count 2".split(),
            "add --api-server-count 1",
        ),
        (
            "--deterministic --deterministic-self-check 5 --deterministic-self-check-stop "
            "--data-parallel-size 2".split(),
            "add --api-server-count 1",
        ),
    ],
)
def test_mistakes_are_named(parse, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        parse(*argv)
    assert said in capsys.readouterr().err
