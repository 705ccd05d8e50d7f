"""What cannot be promised is refused with HTTP 400 that names the field, also where the answer would be streamed."""

from __future__ import annotations

import asyncio

import openai
import pytest

from vllm_deterministic.verify.probes import Probe, ask

pytestmark = pytest.mark.serving

REFUSED = {"use_beam_search": True, "watermarking": True, "vllm_xargs": {"anything": 1}}


def _probe(stream: bool, chat: bool, **extra: object) -> Probe:
    return Probe("refused", "Hello", max_tokens=4, logprobs=None, stream=stream, chat=chat, extra_body=extra)


@pytest.mark.parametrize("config", ["det-bf16-compiled-2048"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("field", sorted(REFUSED))
def test_refused_with_400(servers, config, field, stream, chat):
    server = servers.get(config)
    with pytest.raises(openai.BadRequestError) as refusal:
        asyncio.run(ask(server.endpoint, _probe(stream, chat, **{field: REFUSED[field]})))
    assert refusal.value.status_code == 400
    assert refusal.value.param == field
    assert field in str(refusal.value)


@pytest.mark.parametrize("config", ["det-bf16-compiled-2048"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_default_values_are_no_request(servers, config, chat):
    """The control: a client that spells out a default asks for nothing."""
    (answer,) = asyncio.run(ask(servers.get(config).endpoint, _probe(True, chat, use_beam_search=False)))
    assert answer.token_ids
