"""Policies: one file each; `trol.depth.registry` knows them all by name."""

from trol.depth.registry import from_settings, names, resolve, to_settings

__all__ = ["from_settings", "names", "resolve", "to_settings"]
