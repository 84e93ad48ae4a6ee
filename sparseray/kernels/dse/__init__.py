"""Conditional memory: hashing, gather of rows from host memory, gate and convolution, row updates."""
