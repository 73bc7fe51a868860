#!/usr/bin/env bash
# A task file of one's own is handed to lmms-eval by --include_path, and its task
# has the name of one that lmms-eval ships: a local copy of POPE, say.
#
# A good guess: one's own file is taken, with a warning, as lm-eval does it; or
# the clash is refused.
#
# What happens (lmms-eval 0.7.3): the shipped one is taken, and nothing says so:
# the index of tasks is joined as {**later, **earlier}. A changed prompt, a local
# data set or another metric under the old name is never used.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import sys
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import lm_eval.tasks
import lmms_eval.tasks
from loguru import logger

said = []
logger.remove()
logger.add(said.append, level="TRACE")
with tempfile.TemporaryDirectory() as folder:
    for name in ("pope", "arc_easy"):
        (Path(folder) / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
            "doc_to_text: q\ndoc_to_target: a\n")
    theirs = lmms_eval.tasks.TaskManager("INFO", include_path=folder).task_index["pope"]["yaml_path"]
    other = lm_eval.tasks.TaskManager(include_path=folder).task_index["arc_easy"].yaml_path
ignored, taken = not str(theirs).startswith(folder), str(other).startswith(folder)
mentioned = any("pope" in str(line) for line in said)
print(f"lmms-eval reads {theirs}; lm-eval reads {other}; lmms-eval says so: {mentioned}")
sys.exit(0 if ignored and taken and not mentioned else 1)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==5.24.0" "accelerate==1.15.0" \
  "peft==0.21.2" "lm-eval==0.4.13" "loguru==0.7.3" "tenacity==9.2.1" "pydantic==2.14.3" "pillow==12.3.0" || exit 2
"$folder/env/bin/python" -m pip install -qq --no-deps "lmms-eval==0.7.3" || exit 2
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/look.py"
