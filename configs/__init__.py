"""Frozen numerics versions, schedule tables per card, and serve presets."""
