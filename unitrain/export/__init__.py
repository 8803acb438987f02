"""A run's weights in the formats of others."""
