"""The same recipe on every strategy, compared."""
