"""Serving in a slot: requests, the engine's batch, the sampler."""
