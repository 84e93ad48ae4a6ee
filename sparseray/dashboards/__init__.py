"""Dashboards and alert rules as data; they read the registry of metrics alone."""
