"""What is learnt of a conversation, whatever the chat template does with its turns."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from data.samples import encoded, talk
from trol.data.answers import Answers
from trol.data.conversations import ConversationCollator
from trol.data.formats import RowError
from trol.depth.roles import IGNORED_LABEL
from trol.errors import DataError
from trol.host import chat_templates

SPECIAL = re.compile(r"<[|｜][^|｜<>\s']+[|｜]>|</?think>|<(?:start|end)_of_\w+>|<turn\|>|<\|turn>")


def stock() -> dict[str, str]:
    """The chat templates that TRL carries, by name; none where it carries none."""
    found = find_spec("trl")
    folder = Path(str(found.origin)).parent / "chat_templates" if found else Path("none")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


STOCK = stock()


def reading(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of the special tokens that a template writes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(["<pad>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=sorted(set(SPECIAL.findall(template))),
        chat_template=template,
    )


def learnt(processor: Any, messages: Any) -> list[str]:
    """The runs of learnt tokens, as texts."""
    tokenizer = getattr(processor, "tokenizer", processor)
    batch = ConversationCollator(processor)([messages])
    runs, last = [], -1
    for at in (batch["labels"][0] != IGNORED_LABEL).nonzero().flatten().tolist():
        runs[-1:] = [[*runs[-1], at]] if at == last + 1 and runs else [*runs[-1:], [at]]
        last = at
    return [tokenizer.decode(batch["input_ids"][0][run]) for run in runs]


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("turns", [1, 2])
def test_stock_templates_are_learnt_from(name: str, system: str | None, turns: int) -> None:
    tokenizer = reading(STOCK[name])
    texts = [text for n in range(turns) for text in (f"ask {n}?", f"say {n}!")]
    messages = talk(*texts, system=system)
    runs = learnt(tokenizer, messages)
    assert len(runs) == turns
    for number, run in enumerate(runs):
        assert f"say {number}!" in run
        assert "ask" not in run
    if "glm4" not in name:  # which ends a turn by beginning the next
        assert not runs[-1].endswith("!"), "the end of the turn is learnt"
    ids, _ = encoded(tokenizer, messages)
    if system:
        assert system in tokenizer.decode(ids)
    else:
        told = messages if "idefics" in name or "vlm" in name or "llava" in name else None
        told = told or [{**m, "content": m["content"][0]["text"]} for m in messages]
        whole = chat_templates.render(tokenizer, told)[0]
        assert tokenizer.decode(ids) == whole, "exactly what the template renders"


@pytest.mark.parametrize("name", STOCK)
def test_a_prompt_has_the_roles_that_training_had(name: str) -> None:
    tokenizer = reading(STOCK[name])
    messages = talk("ask 0?", "say 0!", "ask 1?")
    prompt = Answers(tokenizer).encoded([messages], prompt=True)
    (ids,), (masks,) = prompt["input_ids"], prompt["assistant_masks"]
    pairs = zip(ids, masks, strict=True)
    said = tokenizer.decode([token for token, answer in pairs if answer])
    assert "say 0!" in said
    assert "ask" not in said
    assert masks[-1] == 0


def by_prefixes(tokenizer: Any, messages: Any) -> list[int]:
    """The naive twin, for templates that only append: lengths of the turns so far."""
    told = [{**m, "content": m["content"][0]["text"]} for m in messages]

    def length(turns: Any, prompt: bool) -> int:
        text = chat_templates.render(tokenizer, turns, prompt=prompt)[0]
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = tokenizer(chat_templates.render(tokenizer, told)[0], add_special_tokens=False)
    labels = [IGNORED_LABEL] * len(ids["input_ids"])
    for number, message in enumerate(told):
        if message["role"] == "assistant":
            span = slice(length(told[:number], True), length(told[: number + 1], False))
            labels[span] = ids["input_ids"][span]
    return labels


APPENDING = [
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}"
    "{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
]
WORDS = [
    ("hi", "hi", "hi", "hi"),
    ("[assistant]x;", "[user]y;[assistant]", " a ", " b\n"),
    ("zqx", "zqxq1z", "zqxa2z", "zqxqa1z"),
    ("ünï ☃", "日本 <|im_end|>", "?", "<|im_start|>user\nno"),
]


@pytest.mark.parametrize("template", APPENDING)
@pytest.mark.parametrize("words", WORDS)
def test_where_templates_only_append_prefixes_say_the_same(
    template: str, words: tuple[str, ...]
) -> None:
    tokenizer, messages = reading(template), talk(*words)
    assert encoded(tokenizer, messages)[1] == by_prefixes(tokenizer, messages)


REWRITING = (
    "{% for m in messages %}[{{ m.role }}]{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% set c = c.split('</think>')[-1] %}"
    "{% if loop.last %}~~{% endif %}{% endif %}{{ c | trim }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]~{% endif %}"
)


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (("a", "b", "c", "d"), ["b;", "~d;"]),
        (("b;", "b;", "b;", "b;"), ["b;;", "~b;;"]),
        (("q", "<think>[user]</think>  b ", "q", "</think>"), ["b;", "~;"]),
    ],
)
def test_of_what_a_template_moves_and_cuts_what_it_renders_is_learnt(
    words: tuple[str, ...], runs: list[str]
) -> None:
    assert learnt(reading(REWRITING), talk(*words)) == runs


def test_a_system_message_without_a_place_goes_in_front_of_the_question() -> None:
    for refusing in ("{{ raise_exception('no system') }}", ""):
        template = (
            "{% for m in messages %}{% if m.role == 'system' %}" + refusing + "{% else %}"
            "[{{ m.role }}]{{ m.content }};{% endif %}{% endfor %}"
        )
        tokenizer = reading(template)
        ids, _ = encoded(tokenizer, talk("ask", "say", system="be brief"))
        assert tokenizer.decode(ids) == "[user]be brief\n\nask;[assistant]say;"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "leaves out what the user says"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
        ("{{ raise_exception('not today') }}", "refuses the conversation: not today"),
        (
            "{% for m in messages %}{{ m.content }}{{ messages | length }}"
            "{{ messages[0].content | length }};{% endfor %}",
            "because of another's words",
        ),
    ],
)
def test_where_no_way_finds_the_answers_the_row_says_why(template: str, told: str) -> None:
    with pytest.raises(RowError, match=told):
        encoded(reading(template), talk("ask", "say something", "ask", "say"))


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = reading("x")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        Answers(tokenizer)


SEEING = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}~{% endif %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def seeing() -> LlavaProcessor:
    tokenizer = reading(SEEING)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=SEEING,
    )


def shown(*texts: str) -> list[dict[str, Any]]:
    messages = talk(*texts)
    for message in messages[::2]:
        message["content"].insert(0, {"type": "image", "image": Image.new("RGB", (40, 30), "red")})
    return messages


@pytest.mark.parametrize("by_offsets", [True, False])
def test_beside_pictures(
    seeing: LlavaProcessor, by_offsets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_offsets:
        monkeypatch.setattr(chat_templates, "marks_by_offsets", lambda *_: False)
    elif not chat_templates.marks_by_offsets(seeing, shown("a")):
        pytest.skip("this transformers does not move marks beside pictures")
    assert learnt(seeing, shown("a", "b", "a", "d")) == ["b;", "~d;"]
    batch = ConversationCollator(seeing)([shown("a", "b"), talk("x", "yy")])
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    plain = seeing.image_processor([Image.new("RGB", (40, 30), "red")], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])


def test_words_that_stand_for_a_picture_are_refused(seeing: LlavaProcessor) -> None:
    with pytest.raises(RowError, match="'<image>' stands in its words"):
        encoded(seeing, talk("what is <image>?", "a word"))


def test_slow_tokenizers_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in WORDS:
        tokenizer, messages = reading(REWRITING), talk(*words)
        wanted = encoded(tokenizer, messages)
        with monkeypatch.context() as slow:
            slow.setattr(type(tokenizer), "is_fast", False)
            assert encoded(tokenizer, messages) == wanted
