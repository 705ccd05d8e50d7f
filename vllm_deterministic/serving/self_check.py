"""The continuous self-check: one request, repeated beside whatever is being served, must keep its bits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

from vllm_deterministic.serving.gate import Gate
from vllm_deterministic.serving.receipts import ChoiceReceipt, first_divergence

__all__ = ["RESULTS", "Ask", "SelfCheck"]

# reference: the first answer under a fingerprint. interrupted: a weight update came in between.
Result = Literal["same", "differs", "failed", "reference", "interrupted"]
RESULTS: tuple[Result, ...] = ("same", "differs", "failed", "reference", "interrupted")

# The canary's answer by the engine of this number; its prompt computed anew (True), or taken from the prefix cache
# where it is there (False).
Ask = Callable[[int, bool], Awaitable[ChoiceReceipt]]


class SelfCheck:
    """Asks every engine the canary twice at once, cold and cached, and compares with the first answer under the
    fingerprint.

    fingerprint: the one that holds now. said: is told each result, with what was found. engines: how many answer, each
    a data parallel rank.
    """

    def __init__(
        self,
        ask: Ask,
        fingerprint: Callable[[], str],
        gate: Gate,
        said: Callable[[Result, str], None],
        engines: int = 1,
    ) -> None:
        self._ask, self._fingerprint, self._gate, self._said = ask, fingerprint, gate, said
        self._asked = [(engine, anew) for engine in range(engines) for anew in (True, False)]
        self._reference: tuple[str, ChoiceReceipt] | None = None

    async def every(self, seconds: float) -> None:
        """Checks for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.once()

    async def once(self) -> Result:
        """One check. Whatever fails in it is a result too: a canary must not take the server down."""
        try:
            result, found = await self._compared()
        except Exception as error:
            result, found = "failed", f"{type(error).__name__}: {error}"
        self._said(result, found)
        return result

    async def _compared(self) -> tuple[Result, str]:
        async with self._gate.passing():
            answers = await self._answers()
            fingerprint = self._fingerprint()
        if answers is None:
            return "interrupted", "by a weight update"
        if self._reference is None or self._reference[0] != fingerprint:
            self._reference = (fingerprint, answers[0])
            kind: Result = "reference"
        else:
            kind = "same"
        for (engine, anew), answer in zip(self._asked, answers, strict=True):
            if (parted := first_divergence(self._reference[1], answer)) is not None:
                how = "computed anew" if anew else "from the prefix cache"
                return "differs", f"{parted.what} from position {parted.position}, engine {engine}, the prompt {how}"
        return kind, f"{answers[0].tokens} tokens"

    async def _answers(self) -> list[ChoiceReceipt] | None:
        """All answers; None where the gate closed first: an update must not wait for a canary."""
        asking = asyncio.ensure_future(asyncio.gather(*(self._ask(engine, anew) for engine, anew in self._asked)))
        closing = asyncio.ensure_future(self._gate.closing())
        try:
            await asyncio.wait((asking, closing), return_when=asyncio.FIRST_COMPLETED)
            return list(asking.result()) if asking.done() else None
        finally:
            for waiting in (asking, closing):
                waiting.cancel()
            await asyncio.gather(asking, closing, return_exceptions=True)
