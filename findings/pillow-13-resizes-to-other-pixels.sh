#!/usr/bin/env bash
# Image processors of vision-language models resize pictures with Pillow, and
# the pixels decide what the model sees.
#
# A good guess: Image.resize gives the same 8-bit pixels in every release, so
# that a reference made with one release can be compared exactly with another.
#
# What happens: Pillow 13.0.0 gives other pixels than 12.3.0 where a picture
# grows in one direction and shrinks in the other. Bicubic values differ by up
# to 14 of 255, Lanczos by up to 26 on random pixels; where both directions grow
# they are equal, and where both shrink they differ by 1 to 5. Thumbnails of
# wide or tall pictures are of the first kind.
#
# Needs Python 3.11 or newer, as Pillow 13 does. Exit 0: as stated; 1: no longer.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/resized.py" <<'PY'
import json
import random

from PIL import Image, __version__

source = random.Random(0)
picture = Image.frombytes("RGB", (17, 35), bytes(source.randrange(256) for _ in range(17 * 35 * 3)))
sizes = {"both grow": (34, 70), "one grows, one shrinks": (100, 20), "both shrink": (8, 16)}
filters = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
pixels = {
    f"{name}, {what}": list(picture.resize(size, kind).tobytes())
    for name, kind in filters.items()
    for what, size in sizes.items()
}
print(json.dumps({"version": __version__, "pixels": pixels}))
PY

for version in 12.3.0 13.0.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/python" -m pip install -qq "pillow==$version" || exit 2
    "$folder/$version/bin/python" "$folder/resized.py" > "$folder/$version.json"
done

python3 - "$folder/12.3.0.json" "$folder/13.0.0.json" <<'PY'
import json
import sys

old, new = (json.load(open(path)) for path in sys.argv[1:])
print(f"Pillow {old['version']} against {new['version']}: largest difference of a value (0 to 255)")
apart = {}
for case, values in old["pixels"].items():
    apart[case] = max(abs(a - b) for a, b in zip(values, new["pixels"][case]))
    print(f"  {case}: {apart[case]}")
as_stated = (
    apart["bicubic, both grow"] == apart["lanczos, both grow"] == 0
    and apart["bicubic, one grows, one shrinks"] > 4
    and apart["lanczos, one grows, one shrinks"] > 8
    and 0 < apart["bicubic, both shrink"] <= 2
)
print("as stated" if as_stated else "no longer as stated")
sys.exit(0 if as_stated else 1)
PY
