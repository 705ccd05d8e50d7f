"""Sampling row by row: a row's algorithm and noise depend on that row's request alone."""
