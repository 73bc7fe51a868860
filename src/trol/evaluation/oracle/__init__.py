"""The oracle: the cheapest level of a menu for every sequence, chosen with the reference at hand.

Experiment 3 of Glavas et al. (arXiv 2410.20022), with controls for what choosing alone gives.
"""

from trol.evaluation.oracle.generating import Questions, answer_all, check_shard, layers_of
from trol.evaluation.oracle.knapsack import Knapsack, solve
from trol.evaluation.oracle.menu import Level, Menu, menu_of, parsed, read_menu
from trol.evaluation.oracle.report import report
from trol.evaluation.oracle.store import Store

__all__ = [
    "Knapsack",
    "Level",
    "Menu",
    "Questions",
    "Store",
    "answer_all",
    "check_shard",
    "layers_of",
    "menu_of",
    "parsed",
    "read_menu",
    "report",
    "solve",
]
