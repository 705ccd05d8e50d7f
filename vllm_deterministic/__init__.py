"""Deterministic serving for vLLM: the same request gives the same bits, whoever else is being served.

Importing this package loads neither torch nor vllm.
"""

from vllm_deterministic.contract import enable

__all__ = ["__version__", "enable"]
__version__ = "0.1.0"
