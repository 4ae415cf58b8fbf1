"""Compressed models in inference servers: a plugin of vLLM."""
