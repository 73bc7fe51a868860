"""Policies: one file each, and the registry that knows them all by name."""

from trol.policies.registry import from_settings, names, resolve, to_settings

__all__ = ["from_settings", "names", "resolve", "to_settings"]
