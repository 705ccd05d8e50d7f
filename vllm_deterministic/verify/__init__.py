"""Probes of any OpenAI endpoint: the one engine every test and tool calls."""
