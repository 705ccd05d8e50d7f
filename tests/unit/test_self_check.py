"""The self-check's own logic: what it compares, and that it never stands in the way of a weight update."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vllm_deterministic.serving.gate import Gate
from vllm_deterministic.serving.receipts import Chain, ChoiceReceipt
from vllm_deterministic.serving.self_check import SelfCheck


def _choice(*ids: int) -> ChoiceReceipt:
    chain = Chain("p", 0)
    chain.add(ids, [-0.5] * len(ids))
    return chain.finish("length")


def _check(ask: Callable[[bool], object], fingerprint: Callable[[], str] = lambda: "a") -> tuple[SelfCheck, list]:
    said: list[tuple[str, str]] = []

    async def asking(engine: int, anew: bool) -> ChoiceReceipt:
        return ask(anew)  # type: ignore[return-value]

    return SelfCheck(asking, fingerprint, Gate(), lambda *result: said.append(result)), said


def _thrice(check: SelfCheck) -> list[str]:
    async def asking() -> list[str]:
        return [await check.once() for _ in range(3)]

    return asyncio.run(asking())


def test_equal_answers_are_the_same() -> None:
    check, said = _check(lambda anew: _choice(1, 2, 3))
    assert _thrice(check) == ["reference", "same", "same"]
    assert said[0] == ("reference", "3 tokens")


def test_a_difference_is_seen_cold_and_cached_and_later() -> None:
    answers = iter([(1, 2), (1, 2), (1, 2), (1, 9), (9, 2), (1, 2)])
    check, said = _check(lambda anew: _choice(*next(answers)))
    assert _thrice(check) == ["reference", "differs", "differs"]
    assert said[1][1] == "tokens from position 1, engine 0, the prompt from the prefix cache"
    assert said[2][1] == "tokens from position 0, engine 0, the prompt computed anew"
    # Already at the reference: cold and cached at once.
    check, _ = _check(lambda anew: _choice(1, int(anew)))
    assert _thrice(check)[0] == "differs"


def test_every_engine_is_asked_and_held_to_one_reference() -> None:
    said: list[tuple[str, str]] = []
    odd = {1: 7}  # the second engine says something else

    async def asking(engine: int, anew: bool) -> ChoiceReceipt:
        return _choice(1, odd.get(engine, 2))

    check = SelfCheck(asking, lambda: "a", Gate(), lambda *result: said.append(result), engines=2)
    assert asyncio.run(check.once()) == "differs"
    assert said == [("differs", "tokens from position 1, engine 1, the prompt computed anew")]
    odd.clear()
    assert asyncio.run(check.once()) == "same"


def test_other_weights_are_another_reference() -> None:
    weights = iter("abb")
    answers = iter([1, 1, 2, 2, 2, 2])
    check, _ = _check(lambda anew: _choice(next(answers)), lambda: next(weights))
    assert _thrice(check) == ["reference", "reference", "same"]


def test_a_failure_is_a_result() -> None:
    def fail(anew: bool) -> ChoiceReceipt:
        raise ConnectionError("gone")

    check, said = _check(fail)
    assert _thrice(check) == ["failed"] * 3
    assert said[0] == ("failed", "ConnectionError: gone")


def test_an_update_does_not_wait_for_the_canary() -> None:
    async def updating() -> tuple[str, bool]:
        gate, aborted = Gate(), asyncio.Event()

        async def hanging(engine: int, anew: bool) -> ChoiceReceipt:
            try:
                await asyncio.sleep(600)  # a paused engine
            except asyncio.CancelledError:
                aborted.set()
                raise
            raise AssertionError

        check = SelfCheck(hanging, lambda: "a", gate, lambda *_: None)
        asking = asyncio.create_task(check.once())
        await asyncio.sleep(0.01)
        await asyncio.wait_for(gate.close(), 5)
        return await asking, aborted.is_set()

    assert asyncio.run(updating()) == ("interrupted", True)
