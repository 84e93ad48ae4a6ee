"""Tensor in, tensor out: a plain PyTorch reference of each operation, and the fast one beside it."""
