"""The gate between requests and weight updates."""

from __future__ import annotations

import asyncio

import pytest

from vllm_deterministic.serving.gate import Gate


async def order_of_events() -> list[str]:
    gate, events = Gate(), []
    hold = asyncio.Event()

    async def request(name: str) -> None:
        async with gate.passing():
            events.append(f"{name} in")
            await hold.wait()
            events.append(f"{name} out")

    async def update() -> None:
        await gate.close()
        events.append("update")
        await asyncio.sleep(0)
        await gate.open()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(request("early"))
        await asyncio.sleep(0.01)
        tasks.create_task(update())
        await asyncio.sleep(0.01)
        tasks.create_task(request("late"))
        await asyncio.sleep(0.01)
        hold.set()
    return events


def test_an_update_waits_for_those_inside_and_keeps_others_out():
    assert asyncio.run(order_of_events()) == ["early in", "early out", "update", "late in", "late out"]


def test_who_fails_inside_has_left():
    async def run() -> None:
        gate = Gate()
        with pytest.raises(ArithmeticError):
            async with gate.passing():
                raise ArithmeticError
        await asyncio.wait_for(gate.close(), 1)

    asyncio.run(run())
