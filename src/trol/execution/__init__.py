"""Execution: one visit by some tokens or rows alone, without what the others would cost.

Knows layers and caches, nothing of policies; imports `host` and `errors`.
"""
