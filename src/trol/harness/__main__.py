"""`python -m trol.harness`: lm-eval's own command with the model `trol`, and trol's task files.

python -m trol.harness lm_eval --model trol --model_args pretrained=trol-tiny --tasks boards ...
python -m trol.harness tasks lm-eval        makes the files on first use and prints their folder
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import sys

from trol.errors import TrolError
from trol.harness.local_tasks import write_tasks
from trol.harness.packages import check_harness

USAGE = "python -m trol.harness lm_eval ARGUMENTS | tasks lm-eval | tasks lmms-eval"


def main(words: list[str]) -> None:
    """Does what the words say; lm-eval gets trol's tasks as `--include_path`, if it gets none."""
    match words:
        case ["lm_eval" | "lm-eval", *rest]:
            check_harness("lm-eval")
            import lm_eval.__main__  # noqa: PLC0415 - heavy, and an extra

            import trol.harness.lm_eval  # noqa: F401, PLC0415 - registers the model

            if rest[:1] == ["run"]:
                rest = rest[1:]
            if rest and rest[0].startswith("-") and "--include_path" not in rest:
                rest = [*rest, "--include_path", str(write_tasks("lm-eval"))]
            sys.argv = ["lm_eval", *rest]
            lm_eval.__main__.cli_evaluate()
        case ["tasks", name]:
            check_harness(name)
            print(write_tasks(name))
        case _:
            sys.exit(f"usage: {USAGE}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except TrolError as error:
        sys.exit(f"trol: {error}")
