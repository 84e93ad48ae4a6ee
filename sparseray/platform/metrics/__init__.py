"""Metrics: their one registry, exporters, and how Prometheus finds them."""
