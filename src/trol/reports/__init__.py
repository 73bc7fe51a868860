"""Pages, charts and descriptions, made from result files, traces and models.

May import every room but `bench` and `cli`.
"""

from __future__ import annotations
