"""`trol eval` and `trol chat` of models that read text, with and without a chat template."""

import io
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

import trol
from cli.command import run
from trol import progress
from trol.data.conversations import read_template
from trol.data.own_files import Pair
from trol.data.pairs import BUILT_IN
from trol.errors import UsageError
from trol.family import loading
from trol.family.presets import byte_level_tokenizer, text_decoder

TEXT = "What does it do? Return the sum of it.\n" * 20


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """A tiny model of text alone in the folder `base`; what was opened is counted."""
    tokenizer = byte_level_tokenizer([TEXT], 300)
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = text_decoder(tokenizer, hidden_size=32, layers=3, heads=2, positions=160)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    opened, open_ = [], loading._open
    monkeypatch.setattr(loading, "_open", lambda *given: opened.append(given) or open_(*given))
    return model, tokenizer, opened


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "notes.txt").write_text(TEXT)
    return str(tmp_path / "notes.txt")


def test_a_suite_of_which_nothing_is_on_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run("eval", "base", "--suite", "trol") == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert first == "base: no set of the suite could be measured."
    assert "POPE: not on disk; bring it with: hf download" in rest


def test_a_text_is_measured(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("eval", "base", "--tasks", f"text:{text}", "--window", 32)
    assert run(*words, "--json") == 0
    result = json.loads(capsys.readouterr().out)["tasks"][f"text:{text}"]
    assert set(result["metrics"]) == {"loss", "perplexity", "bits_per_byte"}
    assert run(*words, "--depth", "0 2") == 0
    output = capsys.readouterr().out
    assert "chance" not in output
    assert f"{result['metrics']['perplexity']:.3f}" not in output  # a layer is left out
    assert f"{result['tokens']} tokens" in output


def test_a_loss_alone_has_no_chance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a model that reads is asked docstrings by default, in plain text."""
    pairs = [Pair(f"What is {n}?", "The sum.", "function") for n in range(3)]
    monkeypatch.setitem(BUILT_IN, "docstrings", lambda split, **_: pairs)
    assert run("eval", "base", "--metrics", "loss", "--questions", 3) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert heading.split() == ["docstrings", "loss"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--tasks", "bords"], 2),
        (["--tasks", "TEXT"], 2),
        (["--tasks", "text:absent.txt"], 1),
        (["--tasks", "chat:absent.jsonl"], 1),
        (["--tasks", "alpaca:absent.json"], 1),
        (["--tasks", "text:TEXT", "--metrics", "rougeL"], 2),
        (["--metrics", "rogueL"], 2),
        (["--questions", "0"], 2),
        (["--new-tokens", "0"], 2),
        (["--window", "1"], 2),
        (["--window", "64", "--tasks", "docstrings"], 2),
        (["--chat-template", "absent.jinja"], 2),
    ],
)
def test_what_no_model_can_do_is_refused_before_one_is_opened(
    words: list[str], code: int, base: tuple, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", "base", *(word.replace("TEXT", text) for word in words)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert base[2] == []


def test_progress_is_printed_in_lines_and_not_on_stdout(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert run("eval", "base", "--tasks", f"text:{text}", "--window", 32, "--json") == 0
    captured = capsys.readouterr()
    windows = json.loads(captured.out)["tasks"][f"text:{text}"]["n"]
    lines = [line for line in captured.err.splitlines() if line.startswith(f"text:{text}: ")]
    assert f"{windows}/{windows}" in lines[-1]


def test_a_base_model_goes_on_from_what_is_typed(
    base: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, _ = base
    lines = ["Return the", "/depth 0 2", "Return the", "/depth", "Return the", "x" * 400, "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run("chat", "base", "--max-new-tokens", 5) == 0
    captured = capsys.readouterr()
    inputs = tokenizer("Return the", return_tensors="pt")
    said = []
    for plan in ("all", "0 2"):
        with trol.depth(model, plan):
            new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0]
        new = new[inputs["input_ids"].shape[1] :]
        said.append(tokenizer.decode(new, skip_special_tokens=True))
    whole, skipped = (" ".join(text.split()) for text in said)
    assert " ".join(captured.out.split()) == f"{whole} {skipped} {whole}"
    assert skipped != whole
    first, *others = captured.err.splitlines()
    assert "no chat template" in first
    assert ["trol: the text has" in line for line in others] == [True]


@pytest.mark.parametrize("as_file", [True, False])
def test_a_template_makes_it_a_chat(
    as_file: bool, base: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}<SEP>{{ m.content }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    given = tmp_path / "t.jinja" if as_file else template
    words = ("--chat-template", given, "--max-new-tokens", 2)
    assert run("chat", "base", *words, "--question", "Sum", "--json") == 0
    captured = capsys.readouterr()
    prompt = len(base[1]("<SEP>Sum")["input_ids"])
    assert json.loads(captured.out)["prompt_tokens"] == prompt
    assert "no chat template" not in captured.err


@pytest.mark.parametrize("name", ["my,notes.txt", "a,b,c", ",", "a, b"])
def test_a_comma_in_a_name(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said how to write one, and it is read then, beside other tasks too."""
    folder = tmp_path / "set,s"
    folder.mkdir()
    for place in (name, str(folder / name)):
        Path(place).write_text(TEXT)
        for others in ("", f",text:{text}"):
            assert run("eval", "base", "--tasks", f"text:{place}{others}", "--window", 32) == 2
            told = capsys.readouterr().err
            escaped = re.findall(r"as in '(.*)'", told)[0]
            words = ("--tasks", f"{escaped}{others}", "--window", 32, "--json")
            assert run("eval", "base", *words) == 0
            tasks = json.loads(capsys.readouterr().out)["tasks"]
            assert set(tasks) == {f"text:{place}", *([f"text:{text}"] if others else [])}


@pytest.mark.parametrize("puts", [True, False])
@pytest.mark.parametrize(
    ("begins", "says_it"),
    [
        ("", False),
        ("{{ bos_token }}", True),
        ("{{- '<bos>' -}} ", True),
        ("\n{{ bos_token }}", False),
    ],
)
def test_a_template_without_the_begin_of_texts_is_warned_of(
    begins: str, says_it: bool, puts: bool, base: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tokenizer that puts one before each text; what ids the template makes is looked at."""
    tokenizer = base[1]
    assert tokenizer.bos_token == "<bos>"
    if puts:
        begin = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin[0]} $A", special_tokens=[begin]
        )
        tokenizer.save_pretrained("base")
    template = begins + "{% for m in messages %}<SEP>{{ m.content }}{% endfor %}"
    words = ("--question", "Sum", "--max-new-tokens", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("chat", "base", "--chat-template", template, *words) == 0
    told = capsys.readouterr().err
    assert ("trol: the chat template does not begin with <bos>" in told) == (puts and not says_it)
    assert run("chat", "base", *words) == 0
    assert "does not begin with" not in capsys.readouterr().err
    refusing = "{{ raise_exception('no conversations') }}"
    trol.load_model("base", chat_template=refusing)  # warnings are errors here


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    for given, says in (("absent", "no file 'absent'"), ("{% for %}", "not well formed")):
        with pytest.raises(UsageError, match=says):
            read_template(given)
    own = "{% if messages[0].role == 'user' %}{{ raise_exception('no user') }}{% endif %}"
    assert read_template(own) == own
    assert read_template("{% generation %}{% endgeneration %}")
