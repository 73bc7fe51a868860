"""How fast data is read and checked: python benchmarks/data.py [--rows N], one JSON object.

Rows and pictures per second are those of `trol data check` on one core; start-up and memory are
those of a fresh process that opens a mixture whose files are indexed, shuffles an epoch, and reads
a thousand conversations of it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import yaml
from PIL import Image

from trol.data.check import check
from trol.data.mixture import Mixture, open_mixture

TEXTS, PICTURES, SIDE = 20_000, 400, 500
"""Rows of each check, and the pixels of a picture's side."""

FRESH = """
import json, resource, sys, time
start = time.perf_counter()
from collections.abc import Mapping
from pathlib import Path
import numpy
from trol.data.conversations import SoundRows
from trol.data.mixture import open_mixture
mixture = open_mixture(Path(sys.argv[1]), cache=Path(sys.argv[2]))
order = iter(numpy.random.default_rng(0).permutation(len(mixture)))
mixture[next(order)]
ready = time.perf_counter() - start
for _ in range(1000):
    mixture[next(order)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
print(json.dumps({"rows": len(mixture), "startup_s": ready, "resident_mb": peak / 1024}))
"""


def main() -> None:
    """Measure in a folder that is deleted afterwards, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large mixture")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(json.dumps({**speeds(folder), **large(folder, given.rows)}, indent=1))


def speeds(folder: Path) -> dict[str, float]:
    """Rows and pictures per second that one process checks."""
    random.seed(0)
    write(folder / "texts.jsonl", TEXTS)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        picture = Image.effect_noise((SIDE, SIDE), 40).convert("RGB")
        picture.resize((125, 125)).resize((SIDE, SIDE)).save(pictures / f"{number}.jpg")
    rows = [conversation(i, image=f"{i}.jpg") for i in range(PICTURES)]
    (folder / "pictured.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    texts = opened(folder, {"texts": {"path": "texts.jsonl"}})
    shown = opened(folder, {"pictured": {"path": "pictured.jsonl", "images": "pictures"}})
    return {
        "text_rows_per_s": TEXTS / seconds(texts),
        "pictures_per_s": PICTURES / seconds(shown),
    }


def large(folder: Path, rows: int) -> dict[str, float]:
    """First indexing of `rows` rows, and start-up and memory of the next process."""
    write(folder / "large.jsonl", rows // 2)
    array = folder / "large.json"
    with (folder / "large.jsonl").open() as lines, array.open("w") as file:
        file.write("[")
        file.writelines(f"{',' if n else ''}{line}" for n, line in enumerate(lines))
        file.write("]")
    sources = {"lines": {"path": "large.jsonl"}, "array": {"path": "large.json"}}
    start = time.perf_counter()
    opened(folder, sources)
    indexing = time.perf_counter() - start
    command = [sys.executable, "-c", FRESH, str(folder / "mixture.yaml"), str(folder / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size = sum((folder / f"large.{kind}").stat().st_size for kind in ("json", "jsonl"))
    return {"indexing_s": indexing, "data_mb": size / 1e6, **json.loads(done.stdout)}


def conversation(number: int, **more: str) -> dict[str, object]:
    """A row of about 600 characters."""
    mark = "<image>\n" if more else ""
    answer = " ".join(str(random.random()) for _ in range(random.randrange(2, 50)))
    turns = [("user", f"{mark}what is number {number}?"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def write(path: Path, rows: int) -> None:
    """A file of JSON lines, text alone."""
    with path.open("w") as file:
        file.writelines(f"{json.dumps(conversation(number))}\n" for number in range(rows))


def opened(folder: Path, sources: Mapping[str, object]) -> Mixture:
    """The mixture of these sources, indexed."""
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": sources}))
    return open_mixture(path, cache=folder / "cache")


def seconds(mixture: Mixture) -> float:
    """How long one process checks it, the best of three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert not check(mixture).damaged
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
