"""The public conformance kit: prove that your strategy keeps the contract.

Importing it needs pytest; running it starts real processes on this machine.
"""

from __future__ import annotations

from .contract import StrategyContract

__all__ = ["StrategyContract"]
