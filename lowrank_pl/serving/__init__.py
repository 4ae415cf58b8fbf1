"""Compressed models where they run: kernels for a GPU, and a plugin of vLLM."""
