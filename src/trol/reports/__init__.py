"""Pictures and reports, made from arrays, traces and result files only."""

from __future__ import annotations
