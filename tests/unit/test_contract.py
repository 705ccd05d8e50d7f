"""Settings travel inside additional_config and say clearly what they do not know."""

from __future__ import annotations

import pytest

import vllm_deterministic
from vllm_deterministic.contract import CONFIG_KEY, Settings
from vllm_deterministic.errors import ConfigurationError


def test_enable_keeps_the_users_own_configuration() -> None:
    own = {"mine": 1}
    merged = vllm_deterministic.enable(own, unseeded="random")
    assert merged == {"mine": 1, CONFIG_KEY: {"numerics": "v1", "unseeded": "random"}}
    assert own == {"mine": 1}
    assert Settings.of(merged) == Settings(unseeded="random")


@pytest.mark.parametrize("absent", [None, {}, {"mine": 1}, {CONFIG_KEY: None}, {CONFIG_KEY: False}, "hashable thing"])
def test_not_asked_for(absent: object) -> None:
    assert Settings.of(absent) is None


@pytest.mark.parametrize("plain", [True, {}])
def test_asked_for_plainly(plain: object) -> None:
    assert Settings.of({CONFIG_KEY: plain}) == Settings()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"numerics": "v9"}, "v9"), ({"unseeded": "maybe"}, "maybe"), ({"speed": 2}, "speed"), ("v1", "v1")],
)
def test_wrong_settings_name_what_is_wrong(wrong: object, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        Settings.of({CONFIG_KEY: wrong})
