"""The expert cache that a GPU plans by itself: its rule, its kernels, its state."""
