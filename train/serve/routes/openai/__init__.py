"""OpenAI's API, and vLLM's for adapters."""
