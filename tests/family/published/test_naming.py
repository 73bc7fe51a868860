"""Names of models: folders and hub names; typos are refused before anything is asked for."""

import time

import pytest
from huggingface_hub.errors import HTTPError

from trol.errors import HostError, UsageError
from trol.family import TrolForConditionalGeneration
from trol.family.loading import load_model
from trol.family.published import files as naming
from trol.family.published.files import check_source
from trol.family.published.opening import find_published


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "/no/such", "a/b/c", "../x", "~/x", "a/"])
def test_what_is_neither_folder_nor_hub_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where nothing is called so
    monkeypatch.setattr(naming, "get_hf_file_metadata", None)
    for opening in (find_published, load_model, TrolForConditionalGeneration.from_pretrained):
        with pytest.raises(UsageError, match="there is no such folder here") as caught:
            opening(name)
        assert repr(name) in str(caught.value)


def test_names_that_pass(tmp_path):
    for name in (tmp_path, str(tmp_path), "BK-Lee/TroL-1.8B", "nobody/nothing_at.all"):
        check_source(name)


def test_shipped_models_are_named():
    with pytest.raises(UsageError, match=r"Did you mean 'trol-tiny'\?.*or a name that trol knows"):
        load_model("trol-tny")


def test_a_file_and_nothing(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"letter\.txt is a file; give the folder"):
        load_model(tmp_path / "letter.txt")
    with pytest.raises(UsageError, match="the name of the model is empty"):
        load_model("")


def test_without_a_network_it_is_tried_once(monkeypatch, caplog):
    asked = []

    def fails(address, **settings):
        asked.append(address)
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(naming, "get_hf_file_metadata", fails)
    started = time.monotonic()
    with pytest.raises(HostError, match=r"cannot be fetched.*service not known"):
        load_model("nobody/nothing")
    assert len(asked) == 1
    assert time.monotonic() - started < 5
    assert caplog.records == []


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(HostError, match=r"config\.json is missing; give the folder"):
        load_model(tmp_path)
