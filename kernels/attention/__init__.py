"""Attention: one reduction tree, executed alike by prefill, chunk, prefix hit and split decode."""
