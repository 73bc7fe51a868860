"""Checkpoints: saving a policy as an adapter, and writing a plan into a model for good.

Imports `policies`, `depth`, `host`, `files` and `errors`.
"""
