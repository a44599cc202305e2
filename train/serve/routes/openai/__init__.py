"""OpenAI's API, with vLLM's routes for adapters."""
