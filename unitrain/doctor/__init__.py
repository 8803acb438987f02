"""Is this machine, or are these nodes, fit to train? Each check passes, warns or fails, with a line that mends it."""
