"""Mixture of experts: router, map of tokens by expert, grouped products, decoding."""
