"""Curves: what each way to choose layers keeps of a model's quality, at what cost."""

from trol.evaluation.curves.methods import METHODS, ORACLE, Request, check_methods
from trol.evaluation.curves.shares import shares_of
from trol.evaluation.curves.tables import curve

__all__ = ["METHODS", "ORACLE", "Request", "check_methods", "curve", "shares_of"]
