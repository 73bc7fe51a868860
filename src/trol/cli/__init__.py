"""The `trol` command: one file per verb, imported when it is called; may import every other room.

`terminal` is what all verbs share, `models` opens the models and plans that they name.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from trol.errors import TrolError, UsageError
from trol.host import check_release

if TYPE_CHECKING:
    import typer

VERBS = {
    "demo": "trol.cli.demo:demo",
    "chat": "trol.cli.chat:chat",
    "map": "trol.cli.map:map_question",
    "eval": "trol.cli.eval:evaluate",
    "train": "trol.cli.train:train",
    "data": "trol.cli.data:data",
    "bench": "trol.cli.bench:bench",
    "plan": "trol.cli.plan:plan",
    "curve": "trol.cli.curve:curve",
    "export": "trol.cli.export:export",
    "oracle": "trol.cli.oracle:oracle",
    "calibrate": "trol.cli.calibrate:calibrate",
    "study": "trol.cli.study:study",
    "convert": "trol.cli.convert:convert",
    "info": "trol.cli.info:info",
}
FETCH_NOTHING = ("demo", "bench")
"""Verbs that open no model of another name or place, and so need no `--offline`."""
HELP = {"-h", "--help"}
FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the verb that `arguments` (default: the command line) names, and exit with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = words[0] if words else ""
    try:
        if verb in VERBS and verb != "info" and not HELP & set(words):
            check_release()
        application(words)(args=words, prog_name="trol")
        code = 0
    except (TrolError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has gone (`trol … | head`): leave quietly, and let the final flush succeed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            print(f"trol: {error}", file=sys.stderr)
        code = BAD_USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def application(words: Sequence[str]) -> typer.Typer:
    """The commands: the verb that `words` starts with, or all of them to list or to suggest."""
    import typer

    from trol.cli import terminal

    app = typer.Typer(
        epilog="`trol VERB --help` ends with three commands that run.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    # With a callback of its own, one registered verb is still a verb.
    app.callback()(terminal.root)
    for verb in words[:1] if words and words[0] in VERBS else VERBS:
        module_name, function = VERBS[verb].split(":")
        module = importlib.import_module(module_name)
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in module.EXAMPLES)
        called = getattr(module, function)
        app.command(verb, epilog=epilog)(
            called if verb in FETCH_NOTHING else terminal.may_be_offline(called)
        )
    return app
