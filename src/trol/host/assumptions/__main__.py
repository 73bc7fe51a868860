"""Prints the table of assumptions as a page."""

from trol.host.assumptions import rendered

print(rendered(), end="")
