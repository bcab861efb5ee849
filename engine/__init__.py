"""Training and evaluation. The engine receives models, loaders and optimizers; it builds none of them."""
