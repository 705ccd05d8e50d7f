"""Thin adapters, one per vLLM seam. They hold no arithmetic."""
