"""Will it fit, and how fast can it be: models, machines and links."""
