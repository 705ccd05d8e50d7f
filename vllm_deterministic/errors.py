"""Every error this package raises on purpose.

* DeterministicError
  x ConfigurationError      the user's flags, environment or model: the message says what to change
    + UnsupportedError      a feature that is not on the allow-list of this numerics version
  x SeamError               vLLM is missing, of an unknown version, or not built as the adapters expect: fail closed
  x CertificationError      no schedule of an operator is on its reduction tree on this machine
"""

__all__ = ["CertificationError", "ConfigurationError", "DeterministicError", "SeamError", "UnsupportedError"]


class DeterministicError(Exception):
    """Base of all errors of this package."""


# ValueError as well: vLLM reports a ValueError of its configuration step as a plain start-up error.
class ConfigurationError(DeterministicError, ValueError):
    """The configuration asks for something contradictory or unknown."""


class UnsupportedError(ConfigurationError):
    """The configuration asks for something that has not been proved deterministic."""


class SeamError(DeterministicError, RuntimeError):
    """A place in vLLM that an adapter relies on is missing or has changed."""


class CertificationError(DeterministicError, RuntimeError):
    """An operator has no schedule left that gives the bits of its reduction tree."""
