"""Text decoders from nothing, pairs as data, and the recipes of Glavas et al. on stand-ins."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import trol
from trol.data.pairs import pairs_of
from trol.depth import attached, depth, is_attached, trace
from trol.errors import HostError, UsageError
from trol.evaluation.answers import losses
from trol.evaluation.items import Item
from trol.family import word_tokenizer
from trol.family.presets import byte_level_tokenizer, separate, text_decoder
from trol.training import names, resolve, run
from trol.training.adapters import learner_of
from trol.training.opening import opened
from trol.training.recipe import Recipe
from trol.training.stage_data import sized, stage_data

TINY = [name for name in names() if name.startswith("glavas-tiny-")]
PAPERS = [name for name in names() if name.startswith("glavas-") and name not in TINY]
SMALL = "decoder={hidden_size: 16, layers: 12, heads: 2, vocabulary: 300}"


def short(name: str, *overrides: str) -> Recipe:
    """A tiny recipe with three steps of four pairs."""
    stages = resolve(name).stages
    less = [f"stages.{s}.{k}" for s in stages for k in ("steps=3", "batch=4", "warmup_steps=0")]
    return resolve(name, [SMALL, *less, *overrides])


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("glavas") / "full"
    run(short("glavas-tiny-full"), out)
    return out


def items() -> list[Item]:
    return [Item(None, p.question, p.answer, p.type) for p in pairs_of("docstrings", "test")[:4]]


def test_a_plain_decoder_opens_with_and_without_trol(full: Path) -> None:
    model, tokenizer = trol.load_model(full)
    plain = AutoModelForCausalLM.from_pretrained(full).eval()
    assert not is_attached(model)
    assert json.loads((full / "config.json").read_text())["model_type"] == "llama"
    assert AutoTokenizer.from_pretrained(full).chat_template == tokenizer.chat_template
    ids = tokenizer("What does it do?<SEP>", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.config.num_hidden_layers == 12


def test_the_same_recipe_gives_the_same_model(full: Path, tmp_path: Path) -> None:
    recipe = short("glavas-tiny-full")
    run(recipe, tmp_path / "again")
    models = [trol.load_model(folder)[0] for folder in (full, tmp_path / "again")]
    torch.manual_seed(recipe.seed)
    start, _ = opened(recipe, None)
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, models[1].get_parameter(name)), name
    assert not torch.equal(models[0].lm_head.weight, start.lm_head.weight)


@pytest.mark.parametrize("name", [name for name in TINY if name != "glavas-tiny-full"])
def test_a_tiny_recipe_goes_on_from_the_full_one(full: Path, tmp_path: Path, name: str) -> None:
    """What learns is what the stage says, but for layers that nobody visits."""
    recipe = short(name)
    before = dict(AutoModelForCausalLM.from_pretrained(full).named_parameters())
    run(recipe, tmp_path / "out", start=full)
    model, tokenizer = trol.load_model(tmp_path / "out")
    policy = attached(model)[1].depth_policy
    assert policy.name == recipe.policy["policy"]
    moved = {
        number
        for number in range(12)
        for key, p in model.named_parameters()
        if f"layers.{number}." in key and key in before and not torch.equal(p, before[key])
    }
    (stage,) = recipe.stages.values()
    learning = range(12) if "decoder" in stage.train else ()
    assert moved == {number for number in learning if not policy.skips(number)}
    again, _ = trol.load_model(tmp_path / "out")
    assert losses(model, tokenizer, items()) == losses(again, tokenizer, items())


def test_a_stage_without_the_policy_freezes_nothing(full: Path) -> None:
    recipe = short("glavas-tiny-skip", "stages.skip.traverse=false")
    model, _ = opened(recipe, full)
    assert all(p.requires_grad for p in learner_of(model, recipe.stages["skip"]).parameters())


def test_answers_skip_and_prompts_do_not(full: Path) -> None:
    model, tokenizer = opened(short("glavas-tiny-skip"), full)
    stage = short("glavas-tiny-skip").stages["skip"]
    data = stage_data(model, tokenizer, stage, 0)
    batch = data.collate([data.rows[0], data.rows[1]])
    with trace(model) as seen, torch.no_grad():
        model(**batch)
    answer = batch["labels"] != -100
    assert (seen.visits[1][answer] == 0).all()
    assert (seen.visits[1][~answer & batch["attention_mask"].bool()] == 1).all()
    text = tokenizer.decode(batch["input_ids"][0][answer[0]])
    assert text == pairs_of("docstrings", "train")[0].answer + "<eos>"


def test_a_policy_with_parameters_is_not_replaced(full: Path, tmp_path: Path) -> None:
    recipe = short("glavas-tiny-full", "policy={policy: trol_mixer}")
    run(recipe, tmp_path / "mixed", start=full)
    with pytest.raises(UsageError, match="comes with the policy TrolMixer"):
        opened(short("glavas-tiny-skip"), tmp_path / "mixed")


@pytest.fixture(scope="module")
def standins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT of 24 layers without chat template or separator, and files of the paper's sets."""
    folder = tmp_path_factory.mktemp("paper")
    tokenizer = word_tokenizer(["add one and two please it is three news of the day"])
    tokenizer.chat_template = None
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 24, "num_attention_heads": 2}
    config = OPTConfig(
        vocab_size=len(tokenizer),
        **sizes,
        word_embed_proj_dim=16,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    OPTForCausalLM(config).save_pretrained(folder / "opt")
    tokenizer.save_pretrained(folder / "opt")
    rows = [{"instruction": f"add {n}", "input": "", "output": "three " * n} for n in range(1, 12)]
    (folder / "alpaca.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "cnn").mkdir()
    article = json.dumps({"article": "news of the day " * 600, "highlights": "news"})
    (folder / "cnn" / "train.jsonl").write_text(article + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_of_the_paper_trains_a_stand_in(standins: Path, tmp_path: Path, name: str) -> None:
    (stage,) = resolve(name).stages
    data = f"cnn_dailymail:{standins / 'cnn'}" if "cnn" in name else None
    overrides = [
        f"host={standins / 'opt'}",
        f"stages.{stage}.data={data or 'alpaca:' + str(standins / 'alpaca.json')}",
        f"stages.{stage}.batch=12",
        f"stages.{stage}.accumulate=1",
    ]
    recipe = resolve(name, overrides)
    fresh, tokenizer = opened(recipe, None)
    data = stage_data(fresh, tokenizer, recipe.stages[stage], 0)
    longest = data.rows.batch(range(len(data.rows)))["input_ids"].shape[1]
    assert longest <= recipe.stages[stage].max_tokens
    assert not data.rows.left_out
    results = run(recipe, tmp_path / "out")
    assert results["steps"] == sized(recipe.stages[stage], data.rows).steps
    model, tokenizer = trol.load_model(tmp_path / "out")
    assert tokenizer.sep_token == "<SEP>"
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer)
    again, _ = opened(recipe, tmp_path / "out")  # what `--from` and `--resume` open
    assert attached(again)[1].depth_policy.name == recipe.policy["policy"]


def test_settings_of_the_paper() -> None:
    for name in PAPERS:
        recipe = resolve(name)
        (stage,) = recipe.stages.values()
        assert (recipe.host, recipe.seed) == ("facebook/opt-iml-1.3b", 42)
        assert stage.batch == (48 if "cnn" in name else 64)
        assert stage.learning_rate == (5e-5 if "cnn" in name else 2e-5)
        assert stage.epochs == (1 if "fixed" in name else 2)
    skipping = resolve("glavas-uls12-alpaca").policy
    assert trol.Plan(skipping["plan"]).visits == (1, 0) * 11 + (1,)


def test_the_paper_s_form_is_bos_user_sep_assistant_eos(standins: Path) -> None:
    model, tokenizer = opened(resolve("glavas-full-alpaca", [f"host={standins / 'opt'}"]), None)
    chat = [{"role": "user", "content": "add one"}, {"role": "assistant", "content": "three"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<bos>add one<SEP>three<eos>"
    rest = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert rest == "<bos>add one<SEP>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with depth(model, "plain"), torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_a_byte_level_tokenizer_reads_any_text() -> None:
    tokenizer, again = (byte_level_tokenizer(["sum of the sums"] * 3, 270) for _ in range(2))
    assert tokenizer.get_vocab() == again.get_vocab()
    for text in ("sum of the sums", "Größe → 日本", "a\n\tb  c"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decoder.layer=3"], "Did you mean 'layers'"),
        (["decoder.layers=many"], "decoder.layers is 'many'"),
        (["decoder.layers=0"], "layers is 0"),
        (["decoder.heads=5"], "cannot be divided into 5 heads"),
        (["decoder.vocabulary=100"], "does not hold all bytes"),
        (["host=a/b"], "a host and a decoder"),
        (["bits=4"], "nothing|no weights worth quantising"),
        (["chat_template=separated"], "is for hosts"),
        (["decoder={}", "host=a/b", "chat_template=separate"], "Did you mean 'separated'"),
        (["stages.full.data=docstring"], "Did you mean 'docstrings'"),
        (["stages.full.prompt_share=0.5", "stages.full.max_tokens=0"], "a share of max_tokens"),
        (["stages.full.prompt_share=1"], "prompt_share is 1.0"),
    ],
)
def test_a_decoder_that_cannot_be_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        opened(resolve("glavas-tiny-full", overrides), None)


def test_the_paper_s_form_is_for_text_alone() -> None:
    model, processor = trol.load_model("trol-tiny")
    with pytest.raises(HostError, match="knows no pictures"):
        separate(model, processor)
    tokenizer = byte_level_tokenizer(["a"], 300)
    tokenizer.eos_token = None
    with pytest.raises(HostError, match="set eos_token"):
        separate(model, tokenizer)
    assert text_decoder(byte_level_tokenizer(["a"], 300)).num_hidden_layers == 12
