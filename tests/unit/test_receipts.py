"""The request field, the receipts and their signatures, the spliced bytes, and replay."""

from __future__ import annotations

import http.server
import json
import math
import struct
import threading
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest

from vllm_deterministic import cli
from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.serving import field, promise, splice
from vllm_deterministic.serving.fingerprint import Fingerprint, Numerics
from vllm_deterministic.serving.receipts import Chain, Receipt, first_divergence, prompt_digest
from vllm_deterministic.serving.replay import choices_of, find_receipt

ROOT = Path(__file__).parents[2]
FINGERPRINT = Fingerprint(Numerics("v1", {}, {}, "bfloat16", {}, "none", {}), "w", "t", "c")
OTHER = "vd1-" + "0" * 32


def _choice(ids: list[int], logprobs: list[float], reason: str = "stop", prompt: str = "p", index: int = 0) -> Any:
    chain = Chain(prompt, index)
    chain.add(ids, logprobs)
    return chain.finish(reason)


# --- chains -----------------------------------------------------------------------------------------------------
def test_equal_answers_have_equal_chains_however_they_arrive() -> None:
    pieces = Chain("p", 0)
    for token, logprob in ((1, -0.5), (2, -1.5), (3, -math.inf)):
        pieces.add([token], [logprob])
    assert pieces.finish("stop") == _choice([1, 2, 3], [-0.5, -1.5, -9999.0])


@pytest.mark.parametrize(
    ("ids", "logprobs", "reason", "position", "what"),
    [
        ([1, 9, 3], [-0.5, -1.5, -2.5], "stop", 1, "tokens"),
        ([1, 2, 3], [-0.5, -1.5, struct.unpack("<f", struct.pack("<I", 0xC0200001))[0]], "stop", 2, "logprobs"),
        ([1, 2], [-0.5, -1.5], "stop", 2, "length"),
        ([1, 2, 3, 4], [-0.5, -1.5, -2.5, -1.0], "stop", 3, "length"),
        ([1, 2, 3], [-0.5, -1.5, -2.5], "length", 3, "finish_reason"),
    ],
    ids=["token", "last bit of a logprob", "truncated", "longer", "reason"],
)  # fmt: skip
def test_an_altered_answer_is_seen(
    ids: list[int], logprobs: list[float], reason: str, position: int, what: str
) -> None:
    whole = _choice([1, 2, 3], [-0.5, -1.5, -2.5])
    parted = first_divergence(whole, _choice(ids, logprobs, reason))
    assert parted is not None
    assert (parted.position, parted.what) == (position, what)
    assert first_divergence(whole, whole) is None


def test_a_chain_belongs_to_its_prompt_and_its_place() -> None:
    digests = {_choice([1], [-1.0], prompt=prompt, index=index).digest for prompt in "pq" for index in (0, 1)}
    assert len(digests) == 4
    assert prompt_digest([1, 2]) != prompt_digest([258])


# --- receipts ---------------------------------------------------------------------------------------------------
def _recorded(signer: Any = None, body: dict[str, Any] | None = None) -> promise.Recorder:
    recorder = promise.Recorder(
        promise.Promise.of(FINGERPRINT, {}, signer),
        "/v1/completions",
        body or {"prompt": "x", "stop": None, "stream": True},
    )
    recorder.begin(2)
    recorder.ran([1, 2], {"seed": 7, "temperature": 0.5, "top_k": None})
    recorder.add(1, [5], [-0.5], "stop")
    return recorder


def test_a_receipt_follows_its_schema_and_waits_for_the_whole_answer() -> None:
    recorder = _recorded()
    assert recorder.receipt() is None
    recorder.add(0, [3], [-0.25], None)
    recorder.add(0, [4], [-0.25], "length")
    receipt = recorder.receipt()
    assert receipt is not None
    committed = json.loads((ROOT / "docs" / "receipt.schema.json").read_text())
    assert committed == Receipt.model_json_schema(), "run scripts/receipt-schema"
    jsonschema.validate(json.loads(json.dumps(receipt.as_json())), committed)
    assert [choice.tokens for choice in receipt.choices] == [2, 1]
    assert receipt.request.body == {"prompt": "x", "stop": None, "seed": 7, "temperature": 0.5}
    assert find_receipt(json.dumps({"choices": [], "deterministic": {"receipt": receipt.model_dump()}})) == receipt
    assert find_receipt(json.dumps(receipt.as_json())) == receipt


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"deterministic": {}}', 'data: {"id": 1}\n\ndata: [DONE]'])
def test_what_is_no_receipt_is_named_so(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no receipt"):
        find_receipt(text)


def test_chains_of_an_answer_are_those_of_the_server() -> None:
    answer = {
        "prompt_token_ids": [1, 2],
        "choices": [
            {"index": i, "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}
            for i, ids, logprobs, reason in (
                (0, [3, 4], {"token_logprobs": [-0.25, -0.25]}, "length"),
                (1, [5], {"content": [{"logprob": -0.5}]}, "stop"),
            )
        ],
    }  # fmt: skip
    recorder = _recorded()
    recorder.add(0, [3, 4], [-0.25, -0.25], "length")
    receipt = recorder.receipt()
    assert receipt is not None
    assert choices_of(answer) == (receipt.prompt.digest, receipt.choices)
    answer["choices"][1]["finish_reason"] = "tool_calls"  # the engine stopped, and the text is a call
    assert choices_of(answer) == (receipt.prompt.digest, receipt.choices)


def test_signatures_hold_and_break(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

    from vllm_deterministic.serving.signing import load_signer, signature_holds

    def written(key: Any) -> Path:
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        path = tmp_path / "key.pem"
        path.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
        return path

    signer = load_signer(written(ed25519.Ed25519PrivateKey.generate()))
    recorder = _recorded(signer)
    recorder.add(0, [3], [-0.25], "stop")
    receipt = recorder.receipt()
    assert receipt is not None
    read = Receipt.model_validate_json(receipt.model_dump_json())
    assert signature_holds(read)
    assert signature_holds(read, signer.public_key)
    assert not signature_holds(read, "0" * 64)
    assert not signature_holds(read.model_copy(update={"fingerprint": OTHER}))
    assert not signature_holds(read.model_copy(update={"signature": None}))
    with pytest.raises(ConfigurationError, match="Ed25519"):
        load_signer(written(x25519.X25519PrivateKey.generate()))
    with pytest.raises(ConfigurationError, match="signing-key"):
        load_signer(tmp_path / "none.pem")


# --- the request field ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (None, field.Asked()),
        (False, field.Asked(declined=True)),
        (True, field.Asked(required=True)),
        ("require", field.Asked(required=True)),
        ({"require": OTHER}, field.Asked(required=True, fingerprint=OTHER)),
        ({"receipt": True}, field.Asked(receipt=True)),
        ({}, field.Asked()),
    ],
)
def test_what_may_be_asked(value: Any, asked: field.Asked) -> None:
    assert field.read(json.dumps({"deterministic": value}).encode())[0] == asked


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("yes", "deterministic"),
        (1, "deterministic"),
        ([], "deterministic"),
        ({"foo": 1}, "deterministic.foo"),
        ({"receipt": 1}, "deterministic.receipt"),
        ({"require": "vd1-1"}, "deterministic.require"),
        ({"require": None}, "deterministic.require"),
    ],
)
def test_what_may_not(value: Any, param: str) -> None:
    with pytest.raises(field.FieldError) as refusal:
        field.read(json.dumps({"deterministic": value}).encode())
    assert (refusal.value.status, refusal.value.param) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\u0064eterministic": "require"}',
        '{"deterministic": "require"}'.encode("utf-16"),
        '{"deterministic": "require"}'.encode("utf-8-sig"),
        b'{"deterministic": false, "deterministic": "require"}',
    ],
    ids=["escaped", "utf-16", "bom", "twice"],
)
def test_the_field_cannot_hide(body: bytes) -> None:
    """Whatever vLLM's own reading of the body finds, is found here."""
    assert json.loads(body)["deterministic"] == "require"
    assert field.read(body)[0].required


def test_without_the_flag_and_with_another_fingerprint() -> None:
    asked = field.Asked(required=True, fingerprint=OTHER)
    for fingerprint, status in ((None, 400), (str(FINGERPRINT), 409)):
        with pytest.raises(field.FieldError) as refusal:
            field.check(asked, fingerprint)
        assert refusal.value.status == status
    assert OTHER in str(refusal.value)
    assert str(FINGERPRINT) in str(refusal.value)
    field.check(field.Asked(declined=True), None)
    field.check(asked, OTHER)


# --- spliced bytes ----------------------------------------------------------------------------------------------
def test_splicing_leaves_the_rest_as_it_is() -> None:
    assert splice.with_members(b'{"a": 1.50}\n', {"b": 2}) == b'{"a": 1.50,"b":2}'
    assert splice.with_members(b"{}", {"b": 2}) == b'{"b":2}'
    assert splice.with_members(b"[1]", {"b": 2}) == b"[1]"
    text = json.dumps({"id": "x", "text": '"system_fingerprint": "fake"'}, separators=(",", ":")).encode()
    (stamped,) = [json.loads(splice.stamped(b"data: " + text + b"\n\n", "vd1")[6:])]
    assert stamped == {"system_fingerprint": "vd1", **json.loads(text)}
    for left in (
        b'data: {"id":"x","system_fingerprint":"vd1"}\n\n',
        b'data: {"error":{}}\n\n',
        b"data: [DONE]\n\n",
        b": ",
    ):
        assert splice.stamped(left, "other") == left


# --- replay on a server that has token ids and nothing of this plugin -------------------------------------------------
class Plain(http.server.BaseHTTPRequestHandler):
    answer: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert (asked["prompt"], asked["seed"], asked["return_token_ids"]) == ("x", 7, True)
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())

    def log_message(self, *args: Any) -> None:
        del args


@pytest.mark.parametrize(
    ("ids", "logprob", "verdict"),
    [
        ([3, 4], -0.25, "same bits"),
        ([3, 9], -0.25, "tokens from position 1"),
        ([3, 4], -0.5, "logprobs from position 0"),
    ],
)
def test_replay_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: list[int], logprob: float, verdict: str
) -> None:
    recorder = _recorded()
    recorder.add(0, [3, 4], [-0.25, -0.25], "length")
    receipt = recorder.receipt()
    assert receipt is not None
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps(receipt.as_json()))
    choices = [
        {
            "index": i,
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [value] * len(tokens)},
            "finish_reason": reason,
        }
        for i, tokens, value, reason in ((1, [5], -0.5, "stop"), (0, ids, logprob, "length"))
    ]
    Plain.answer = {"prompt_token_ids": [1, 2], "choices": choices}
    with http.server.HTTPServer(("127.0.0.1", 0), Plain) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            status = cli.main(["replay", str(path), "--url", f"http://127.0.0.1:{server.server_port}/v1"])
        finally:
            server.shutdown()
            thread.join()
    said = capsys.readouterr().out
    assert verdict in said
    assert "promises nothing" in said
    assert status == (0 if verdict == "same bits" else 1)
    # An unsigned receipt does not pass for one that somebody has signed.
    assert cli.main(["replay", str(path), "--url", "http://127.0.0.1:1", "--public-key", "00"]) == 1
