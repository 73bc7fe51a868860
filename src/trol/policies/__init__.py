"""Policies: one file each; `trol.depth.policy` knows them all by name."""

from trol.depth.policy import from_settings, names, resolve, to_settings

__all__ = ["from_settings", "names", "resolve", "to_settings"]
