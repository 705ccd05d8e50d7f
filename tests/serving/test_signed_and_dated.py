"""Over HTTP: receipts that the server signs, and the day that its chat template asks for."""

from __future__ import annotations

import contextlib
import json

import openai
import pytest

from vllm_deterministic import cli
from vllm_deterministic.serving.fingerprint import differing_parts
from vllm_deterministic.serving.replay import find_receipt
from vllm_deterministic.serving.signing import signature_holds
from vllm_deterministic.train import LiveServer
from vllm_deterministic.verify.server import serve

pytestmark = [pytest.mark.serving, pytest.mark.slow]

TEMPLATE = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n{% for message in messages %}Q: {{ message.content }}\n{% endfor %}A:"
)


@pytest.fixture(scope="module")
def started(servers, model, tmp_path_factory):
    """Starts a server whose chat template asks for the day, with more options, beside nobody."""
    folder = tmp_path_factory.mktemp("dated")
    (folder / "template").write_text(TEMPLATE)

    @contextlib.contextmanager
    def starting(*options: str):
        servers.stop()
        sizes = ("--dtype", "bfloat16", "--max-model-len", "1024", "--enforce-eager", "--deterministic")
        template = ("--chat-template", str(folder / "template"))
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        with serve(model("bfloat16"), *sizes, *template, *options, env=env, log=folder / "log") as server:
            http = openai.DefaultHttpxClient(trust_env=False)
            with openai.OpenAI(base_url=server.base_url, api_key="x", max_retries=0, http_client=http) as client:
                yield server, client

    return starting


def asked(server, client, **options):
    extra = {"return_prompt_text": True, "deterministic": {"receipt": True}}
    messages = [{"role": "user", "content": "Which day is it?"}]
    return client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=12, temperature=0.8, extra_body=extra, **options
    )


def test_signed_and_dated(started, tmp_path, capsys):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    key = ed25519.Ed25519PrivateKey.generate()
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "key").write_bytes(key.private_bytes(pem, raw, serialization.NoEncryption()))
    public = key.public_key().public_bytes_raw().hex()

    dated = ("--deterministic-date", "2001-02-03")
    with started(*dated, "--deterministic-signing-key", str(tmp_path / "key")) as (server, client):
        there = LiveServer(server.url).description()
        assert there["signing_key"] == public
        assert there["parts"]["settings.date"] == "2001-02-03"
        answer = asked(server, client)
        assert answer.prompt_text.startswith("Today is 03 February 2001.")
        receipt = find_receipt(answer.model_dump_json())
        *_, last = asked(server, client, stream=True)
        for one in (receipt, find_receipt(last.model_dump_json())):
            assert signature_holds(one, public)
            assert one.choices == receipt.choices
            # The controls: another key, and a receipt that somebody has edited.
            assert not signature_holds(one, "0" * 64)
            assert not signature_holds(one.model_copy(update={"fingerprint": "vd1-" + "0" * 32}), public)

        path = tmp_path / "answer.json"
        path.write_text(answer.model_dump_json())
        assert cli.main(["replay", str(path), "--url", server.url, "--public-key", public]) == 0
        changed = json.loads(path.read_text())
        changed["deterministic"]["receipt"]["request"]["body"]["temperature"] = 0.9
        path.write_text(json.dumps(changed))
        assert cli.main(["replay", str(path), "--url", server.url]) == 1
        assert "signature: does not hold" in capsys.readouterr().out

    # Another day is another prompt under another fingerprint; it is unsigned where no key was given.
    with started("--deterministic-date", "2001-02-04") as (server, client):
        other = asked(server, client)
        assert other.prompt_text.startswith("Today is 04 February 2001.")
        tomorrow = find_receipt(other.model_dump_json())
        assert tomorrow.signature is None
        assert differing_parts(tomorrow.parts, receipt.parts) == ["settings.date"]
        assert tomorrow.prompt.digest != receipt.prompt.digest


def test_no_day_is_told_where_none_is_pinned(started):
    refused = 'vllm_deterministic_refused_requests_total{field="messages",reason="date"}'
    with started() as (server, client):
        before = server.metric(refused)  # vLLM's own warm-up has asked the template already
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="--deterministic-date ") as refusal:
                asked(server, client, stream=stream)
            assert refusal.value.param == "messages"
        assert server.metric(refused) == before + 2
        # The control: a prompt that no template made is answered.
        assert client.completions.create(model=server.model, prompt="Hi", max_tokens=1).choices
