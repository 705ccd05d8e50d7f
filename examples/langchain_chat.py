"""LangChain's ChatOpenAI on a deterministic server: alone and in a batch, the same messages.

usage: python examples/langchain_chat.py http://127.0.0.1:8000/v1        (pip install langchain-openai)
"""

import sys

import openai
from langchain_openai import ChatOpenAI


def main(url):
    model = openai.OpenAI(base_url=url, api_key="EMPTY").models.list().data[0].id
    chat = ChatOpenAI(
        base_url=url,
        api_key="EMPTY",
        model=model,
        temperature=0.8,
        seed=7,
        max_tokens=24,
        extra_body={"deterministic": "require"},
    )
    question = "Name three colours of the sea."
    alone = chat.invoke(question)
    among_others = chat.batch([question, *(f"Tell me about the number {number}." for number in range(7))])[0]
    streamed = "".join(chunk.content for chunk in chat.stream(question))
    same = alone.content == among_others.content == streamed
    print(alone.content)
    print(f"{alone.response_metadata['system_fingerprint']}: {'the same three times' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
