"""The agent of one node: it starts the node's ranks, watches them, keeps their logs and ends them together.

It needs no framework and is small enough to start in milliseconds; the ranks may be forked from a warm process that
has imported the framework once.
"""
