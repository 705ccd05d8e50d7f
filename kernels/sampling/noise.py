"""Stateless sampling noise: a function of (seed, position), expanded per token by the sampling kernel."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed", "noise_seed"]


def noise_seed(seed: int, position: int) -> int:
    """Seed in [0, 2^63) of the noise that draws the token at absolute `position` of a request with `seed`.

    BLAKE2b instead of a counter added to the seed: choice i of an n-way request has seed + i, and its stream must not
    be a shifted copy of choice 0's.
    """
    digest = hashlib.blake2b(f"noise/{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derive_seed(server_seed: int, content: bytes) -> int:
    """Seed in [0, 2^31) of a request that brings none: a function of the server's seed and the request's content.

    31 bits leave room for the seed + i of n choices in every consumer's integer type.
    """
    digest = hashlib.blake2b(content, digest_size=8, key=f"seed/{server_seed}".encode()).digest()
    return int.from_bytes(digest, "little") >> 33
