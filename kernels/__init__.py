"""Operators on frozen reduction trees. Knows nothing of vLLM."""
