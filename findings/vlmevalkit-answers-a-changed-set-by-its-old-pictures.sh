#!/usr/bin/env bash
# A set of one's own is a TSV file with base64 pictures in the folder $LMUData. It
# is measured, its pictures are corrected under the same name, and it is measured
# again, in a new process and a fresh output folder.
#
# A good guess: the model sees the pictures that stand in the file.
#
# What happens (ms-vlmeval 0.0.20, the packaged VLMEvalKit; upstream e8e78f05 has
# the same lines): new questions, old pictures. The first run leaves each picture
# in $LMUData/images/SET/INDEX.png, and a file that can be opened there is taken
# for the picture of that index whatever the TSV holds. Nothing says so.
#
# Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/ask.py" <<'PY'
"""Writes a TSV with one picture of a colour, and prints what a model would be shown of it."""
import base64
import importlib.util
import io
import os
import sys
import types
from pathlib import Path

import pandas
from PIL import Image

# The package imports every model it knows; the two modules below are imported without them.
root = Path(importlib.util.find_spec("vlmeval").submodule_search_locations[0])
for name, place in (("vlmeval", root), ("vlmeval.dataset", root / "dataset")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(place)]
from vlmeval.dataset.image_base import ImageBaseDataset


class Own(ImageBaseDataset):
    def evaluate(self, eval_file, **judge):
        pass


colour, file = sys.argv[1], io.BytesIO()
Image.new("RGB", (32, 32), colour).save(file, "PNG")
row = {"index": 0, "image": base64.b64encode(file.getvalue()).decode(),
       "question": f"Is this {colour}?", "answer": "yes"}
pandas.DataFrame([row]).to_csv(Path(os.environ["LMUData"]) / "own.tsv", sep="\t", index=False)
picture, question = Own("own").build_prompt(0)
red, _, blue = Image.open(picture["value"]).convert("RGB").getpixel((0, 0))
print(question["value"], "shown:", "red" if red > blue else "blue")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq "pandas==2.3.3" "pillow==12.3.0" "validators==0.35.0" \
  "sty==1.0.6" "filelock==3.20.0" "huggingface-hub==0.36.0" "tabulate==0.9.0" "requests==2.32.5" || exit 2
"$folder/env/bin/python" -m pip install -qq --no-deps "ms-vlmeval==0.0.20" || exit 2
mkdir "$folder/data"
first=$(LMUData="$folder/data" "$folder/env/bin/python" -W ignore "$folder/ask.py" red | tail -1)
again=$(LMUData="$folder/data" "$folder/env/bin/python" -W ignore "$folder/ask.py" blue | tail -1)
echo "$first"
echo "$again"
[ "$first" = "Is this red? shown: red" ] && [ "$again" = "Is this blue? shown: red" ]
