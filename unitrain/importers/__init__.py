"""Configurations and checkpoints of others, read as data and never run."""
