"""Layer calls: what runs in the place of vLLM's ``forward_modular``."""
