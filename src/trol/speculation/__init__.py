"""Self-speculation: a plan of the same model drafts tokens, and the whole model verifies them.

`generate` gives what it gives without: the same tokens where it is greedy, tokens of the same
distribution where it samples. Only the time differs. Imports `depth`, `host` and `errors`.
"""

from __future__ import annotations

from trol.speculation.speculate import Speculation, speculate

__all__ = ["Speculation", "speculate"]
