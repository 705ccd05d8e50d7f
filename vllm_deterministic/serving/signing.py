"""Ed25519 signatures of receipts, by the `cryptography` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_deterministic.errors import ConfigurationError
from vllm_deterministic.serving.receipts import Receipt, Signature

__all__ = ["Signer", "load_signer", "signature_holds"]


def _cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as missing:
        raise ConfigurationError(
            "signatures need the package cryptography: pip install 'vllm-deterministic[sign]'"
        ) from missing
    return serialization, ed25519


class Signer:
    """Signs with one private key."""

    def __init__(self, private_key: Any) -> None:
        self._key = private_key
        self.public_key: str = private_key.public_key().public_bytes_raw().hex()

    def sign(self, data: bytes) -> Signature:
        return Signature(public_key=self.public_key, value=self._key.sign(data).hex())


def load_signer(path: str | Path) -> Signer:
    """The signer of an unencrypted PEM file (`openssl genpkey -algorithm ed25519`).

    Raises ConfigurationError for a file that cannot be read or holds another kind of key.
    """
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"--deterministic-signing-key {path}: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigurationError(
            f"--deterministic-signing-key {path} holds no Ed25519 key: make one with "
            "`openssl genpkey -algorithm ed25519 -out FILE`"
        )
    return Signer(key)


def signature_holds(receipt: Receipt, public_key: str | None = None) -> bool:
    """Whether the receipt is signed, by the key it names, and by `public_key` (hexadecimal) where that is given."""
    from cryptography.exceptions import InvalidSignature

    _, ed25519 = _cryptography()
    signature = receipt.signature
    if signature is None or (public_key is not None and signature.public_key != public_key.lower()):
        return False
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
        key.verify(bytes.fromhex(signature.value), receipt.signed_bytes())
    except (InvalidSignature, ValueError):
        return False
    return True
