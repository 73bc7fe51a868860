"""Conversion: the same model in a plain folder, whole or resumed, and never half of it."""

import json
from collections import namedtuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from family.published.folders import FAMILIES, published_folder
from trol.errors import DataError, HostError, UsageError
from trol.family import TrolForConditionalGeneration
from trol.family.published import conversion
from trol.family.published.conversion import convert
from trol.family.published.files import MARKER
from trol.family.published.opening import open_published

SMALL = 200_000
"""Bytes in a shard: the tiny checkpoints then make several."""


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path):
    return published_folder(tmp_path / "source", request.param)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def question(processor):
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Which digit?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_the_folder_opens_by_itself_as_the_same_model(source, tmp_path):
    before = contents(source)
    made = convert(source, tmp_path / "made", shard_bytes=SMALL)
    assert contents(source) == before
    assert not list((tmp_path / "made").glob("*partial"))
    assert not (tmp_path / "made" / MARKER).exists()
    first = open_published(TrolForConditionalGeneration, source)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    state = again.state_dict()
    assert all(conversion.same_bits(state[name], held) for name, held in first.state_dict().items())
    assert again.generation_config.eos_token_id == first.generation_config.eos_token_id
    inputs = question(AutoProcessor.from_pretrained(tmp_path / "made"))
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **settings), first.generate(**inputs, **settings))
    assert made.files > 2
    assert made.kept == 0
    assert made.parameters == sum(p.numel() for p in first.parameters())
    assert made.bytes == 4 * made.parameters


def test_another_type_and_gates_of_their_own(tmp_path):
    source = published_folder(tmp_path / "source", "phi3", sharing="per_layer")
    with pytest.warns(UserWarning, match="differ"):
        made = convert(source, tmp_path / "made", dtype=torch.bfloat16)
    assert (made.dtype, made.sharing, made.files) == ("bfloat16", "per_layer", 1)
    again = TrolForConditionalGeneration.from_pretrained(tmp_path / "made")
    assert again.dtype == torch.bfloat16
    assert again.config.depth["sharing"] == "per_layer"
    assert not (tmp_path / "made" / "model.safetensors.index.json").exists()


def test_a_broken_off_conversion_goes_on(source, tmp_path, monkeypatch):
    """Broken off in the third file: two are kept, but a damaged one of them is written again."""
    folder, written = tmp_path / "made", []
    whole = conversion.save_file

    def broken_off(tensors, path, **settings):
        if len(written) == 2:
            path.write_bytes(b"half of a fi")
            raise KeyboardInterrupt
        written.append(path)
        whole(tensors, path, **settings)

    monkeypatch.setattr(conversion, "save_file", broken_off)
    with pytest.raises(KeyboardInterrupt):
        convert(source, folder, shard_bytes=SMALL)
    monkeypatch.setattr(conversion, "save_file", whole)
    left = sorted(file.name for file in folder.iterdir())
    assert [name.split("-")[0] for name in left] == ["model", "model", MARKER]
    with pytest.raises(HostError, match="not finished"):
        open_published(TrolForConditionalGeneration, folder)
    tensors = load_file(folder / left[1])
    tensors[min(tensors)] = tensors[min(tensors)] + 1
    save_file(tensors, folder / left[1])
    steps = []
    made = convert(source, folder, shard_bytes=SMALL, progress=lambda *step: steps.append(step[:2]))
    assert made.kept == 1
    assert steps[:3] == [("checking", 1), ("checking", 2), ("writing", 2)]
    assert TrolForConditionalGeneration.from_pretrained(folder).dtype == torch.float32


def test_what_was_written_is_compared(source, tmp_path, monkeypatch):
    """A disk that keeps other bits than it was given is found out, and the folder stays shut."""
    whole = conversion.save_file

    def other_bits(tensors, path, **settings):
        tensors = {name: tensor + (name == "lm_head.weight") for name, tensor in tensors.items()}
        whole(tensors, path, **settings)

    monkeypatch.setattr(conversion, "save_file", other_bits)
    with pytest.raises(DataError, match=r"1 weights differ, first 'lm_head.weight'"):
        convert(source, tmp_path / "made")
    assert not (tmp_path / "made" / "config.json").exists()
    assert (tmp_path / "made" / MARKER).exists()


def test_places_that_are_refused(source, tmp_path):
    with pytest.raises(UsageError, match="lies within"):
        convert(source, source / "made")
    with pytest.raises(UsageError, match="lies within"):
        convert(source, tmp_path / "x" / ".." / "source")
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        convert(source, full)
    with pytest.raises(UsageError, match="is a file"):
        convert(source, full / "letter.txt")
    (full / MARKER).write_text(json.dumps({"sizes": {}}))
    with pytest.raises(UsageError, match="unfinished conversion of other files"):
        convert(source, full)
    assert (full / "letter.txt").read_text() == "mine"


def test_the_destination_is_judged_before_the_source_is_opened(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "find_published", None)
    (tmp_path / "letter.txt").write_text("mine")
    for place, says in {
        tmp_path: "not empty",
        tmp_path / "letter.txt": "is a file",
        source / "made": "lies within",
        "": "the destination is empty",
        tmp_path / ("x" * 300): "cannot be made or written to .*give a folder in a place",
    }.items():
        with pytest.raises(UsageError, match=says):
            convert(source, place)
    with pytest.raises(UsageError, match="the name of the model is empty"):
        convert("", tmp_path / "made")
    with pytest.raises(UsageError, match="'trol-tiny' is a model that trol ships"):
        convert("trol-tiny", tmp_path / "made")


def test_a_destination_that_cannot_be_made(source, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"made cannot be made or written to \(Not a directory\)"):
        convert(source, tmp_path / "letter.txt" / "made")


def test_a_bad_tokenizer_is_refused_before_anything_is_written(source, tmp_path):
    (source / "tokenizer_config.json").rename(tmp_path / "aside.json")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is missing"):
        convert(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_tokenizer_may_change_meanwhile_but_not_the_weights(source, tmp_path, monkeypatch):
    """Only what the finished files depend on must be as it was."""
    broken_off = monkeypatch.context()
    with broken_off as patched:
        patched.setattr(conversion, "_write_rest", lambda *parts: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):  # noqa: PT011 - it stands for any
            convert(source, tmp_path / "made")
    with pytest.raises(UsageError, match="with other settings"):
        convert(source, tmp_path / "made", dtype=torch.float16)
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 77}))
    assert convert(source, tmp_path / "made").kept == 1


def test_a_finished_conversion_is_not_made_twice(source, tmp_path):
    convert(source, tmp_path / "made")
    before = contents(tmp_path / "made")
    with pytest.raises(UsageError, match=r"is already there and finished.*trol chat .*made"):
        convert(source, tmp_path / "made")
    with pytest.raises(UsageError, match="a finished conversion of other files, or with other"):
        convert(source, tmp_path / "made", dtype=torch.float16)
    assert contents(tmp_path / "made") == before


def test_a_damaged_marker(source, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / MARKER).write_text("{")
    with pytest.raises(UsageError, match="unfinished conversion of other files"):
        convert(source, tmp_path / "made")


def test_a_disk_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"needs 0\.05 GB more, but its disk has 0\.00 GB free"):
        convert(source, tmp_path / "made")
    assert [file.name for file in (tmp_path / "made").iterdir()] == [MARKER]


def test_a_saved_model_is_not_converted_again(source, tmp_path):
    convert(source, tmp_path / "made")
    with pytest.raises(HostError, match="no published TroL checkpoint"):
        convert(tmp_path / "made", tmp_path / "twice")


def test_bits_are_compared_not_values():
    nan = torch.tensor([float("nan"), -0.0])
    assert conversion.same_bits(nan, nan.clone())
    assert not conversion.same_bits(nan, torch.tensor([float("nan"), 0.0]))
    assert not conversion.same_bits(nan, nan.half())
