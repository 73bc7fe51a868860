"""Policies: one file for each method. They import `depth`, `host`, `strict` and `errors`."""
