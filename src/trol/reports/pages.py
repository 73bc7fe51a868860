"""Pages: the templates beside this file, filled."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The page that the template `NAME.html.j2` makes of `values`; a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("trol.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{template}.html.j2").render(**values)


@contextmanager
def beside(results: Path) -> Generator[None]:
    """Around what is drawn from results that lie in a file: if it fails, that is said, no more.

    What was measured for hours outlives whatever its page stumbles over.
    """
    try:
        yield
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"the page could not be made ({told}); the results are kept in {results}.", stacklevel=3
        )
