"""The TroL models."""
