"""The only subpackage that imports vLLM."""
