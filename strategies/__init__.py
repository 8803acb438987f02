"""Backends: one file each. To add one, see docs/adding-a-strategy.md."""
