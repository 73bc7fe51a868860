#!/usr/bin/env bash
# lmms-eval is installed beside the newest packages that pip finds.
#
# A good guess: it runs; what it needs it would ask for.
#
# What happens (lmms-eval 0.7.3): it names no bound on filelock, imports, lists its
# tasks, loads the model, and then stops: it changes the private module
# `filelock._api`, which filelock 4 does not have.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import sys

import filelock

from lmms_eval import evaluator

try:
    evaluator._enable_reentrant_filelocks()
    said = "runs"
except ModuleNotFoundError as error:
    said = str(error)
print(f"filelock {filelock.__version__}: {said}")
sys.exit(0 if said == sys.argv[1] else 1)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "torch==2.13.0" "transformers==5.24.0" "accelerate==1.15.0" \
  "peft==0.21.2" "lm-eval==0.4.13" "loguru==0.7.3" "tenacity==9.2.1" "pydantic==2.14.3" "pillow==12.3.0" || exit 2
"$folder/env/bin/python" -m pip install -qq --no-deps "lmms-eval==0.7.3" || exit 2
for release in "3.32.7:runs" "4.3.1:No module named 'filelock._api'"; do
  "$folder/env/bin/python" -m pip install -qq "filelock==${release%%:*}" || exit 2
  HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore "$folder/look.py" "${release#*:}"
done
