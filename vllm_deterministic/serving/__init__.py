"""The contract on the wire: fingerprint, the request field `deterministic`, receipts. Knows HTTP, not vLLM."""
