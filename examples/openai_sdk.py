"""One request, asked synchronously, asynchronously among others, and streamed: the answers are the same, bit for bit.

usage: python examples/openai_sdk.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys

import openai

MESSAGES = [{"role": "user", "content": "Name three colours of the sea."}]
# `deterministic` is not a field of the SDK. "require": the promise, or HTTP 400.
ASK = {
    "messages": MESSAGES,
    "max_tokens": 24,
    "temperature": 0.8,
    "logprobs": True,
    "extra_body": {"deterministic": "require"},
}


def bits(choice):
    """Tokens and logprobs of a choice; a float's repr names its bits."""
    return [(entry.token, repr(entry.logprob)) for entry in choice.logprobs.content]


def synchronously(url, model):
    with openai.OpenAI(base_url=url, api_key="EMPTY") as client:
        answer = client.chat.completions.create(model=model, **ASK)
        return answer.system_fingerprint, bits(answer.choices[0])


def streamed(url, model):
    found = []
    with openai.OpenAI(base_url=url, api_key="EMPTY") as client:
        for chunk in client.chat.completions.create(model=model, stream=True, **ASK):
            if chunk.choices and chunk.choices[0].logprobs:
                found += bits(chunk.choices[0])
    return found


async def among_others(url, model):
    async with openai.AsyncOpenAI(base_url=url, api_key="EMPTY") as client:
        others = [
            client.completions.create(model=model, prompt=f"Story {number}: once", max_tokens=24, seed=number)
            for number in range(8)
        ]
        mine, *_ = await asyncio.gather(client.chat.completions.create(model=model, **ASK), *others)
        return bits(mine.choices[0])


def main(url):
    with openai.OpenAI(base_url=url, api_key="EMPTY") as client:
        model = client.models.list().data[0].id
    fingerprint, first = synchronously(url, model)
    same = first == streamed(url, model) == asyncio.run(among_others(url, model))
    print("".join(token for token, _ in first))
    print(f"{fingerprint}: {'the same three times' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
