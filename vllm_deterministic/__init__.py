"""Deterministic serving for vLLM: the same request gives the same bits, whoever else is being served."""

__all__ = ["__version__"]
__version__ = "0.1.0"
