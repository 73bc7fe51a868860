"""Checkpoints in the layout of the official TroL releases."""
