"""Studies: claims, the measurements that decide them, and the rule by which they do.

May import every room but `bench`, `reports` and `cli`.
"""

from importlib import import_module

from trol.errors import unknown
from trol.studies.study import Study

STUDIES = (
    "isolate",
    "half-the-layers",
    "passes",
    "where",
    "answers",
    "mixing",
    "gatekeepers",
    "single-layers",
    "skip-or-exit",
    "tuned-skip-or-exit",
    "influence-or-greedy",
    "untrained-traversal",
    "real",
    "oracle",
    "confident-exits",
    "drafts",
    "steps",
    "alignment",
    "data",
)
"""The studies by name; each is the `STUDY` of the module of that name."""


def study_of(name: str) -> Study:
    """A study by its name; raises `UsageError` where there is none."""
    if name not in STUDIES:
        raise unknown("study", name, [*STUDIES, "all"])
    return import_module(f"trol.studies.{name.replace('-', '_')}").STUDY


__all__ = ["STUDIES", "Study", "study_of"]
