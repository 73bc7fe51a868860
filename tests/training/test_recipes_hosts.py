"""Every carried recipe runs on small models of the same classes; what cannot run is told why."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from family import parts
from hosts.releases import IMAGES_WITHOUT_TORCHVISION
from training import standins
from trol.depth import attached
from trol.errors import DataError, HostError, UsageError
from trol.family import TrolForConditionalGeneration, TrolProcessor
from trol.training import resolve, run
from trol.training.adapters import learner_of
from trol.training.opening import opened, reopened
from trol.training.recipe import Recipe, Stage
from trol.training.run import device_batch
from trol.training.stage_data import sized, stage_data
from trol.training.trainable import part_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gemm_4bit_forward.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hosts")
    for name in ("vlm", "idefics3", "llm", "clip", "internvit", "internlm2", "phi3"):
        getattr(standins, name)(place / name)
    standins.chats(place / "seen", pictures=True)
    standins.chats(place / "read", pictures=False)
    return place


NAMED = {
    "any-vlm": ("host=vlm",),
    "any-llm": ("host=llm",),
    "trol-1.8b": ("preset.vision=clip", "preset.text=internlm2"),
    "trol-3.8b": ("preset.vision=internvit", "preset.text=phi3"),
    "trol-7b": ("preset.vision=clip", "preset.text=internlm2"),
}
"""Recipe -> the folders that stand in for what it names."""

GATE = "model.language_model.layers.0.depth.weight"


def recipe(folder: Path, name: str, *overrides: str) -> Recipe:
    models = [named.replace("=", f"={folder}/", 1) for named in NAMED[name]]
    data = folder / ("read" if name == "any-llm" else "seen") / "chat.jsonl"
    steps = [
        f"stages.{stage}.{key}"
        for stage in ("step1", "step2")
        for key in (f"data={data}", "batch=4", "accumulate=2")
    ]
    return resolve(name, [*models, *steps, "save_every=0", *overrides])


@pytest.mark.parametrize("name", NAMED)
def test_the_recipe_trains_both_steps_and_what_is_saved_opens(
    folder: Path, tmp_path: Path, name: str
) -> None:
    settings = recipe(folder, name)
    results = run(settings, tmp_path / "out")
    assert results["steps"] == 4  # 8 conversations in batches of 4, once each, in two stages
    model, processor = reopened(tmp_path / "out")
    assert isinstance(model, PeftModel)
    assert attached(model)[1].depth_policy.passes == 2
    assert processor is not None


@pytest.mark.skipif(not IMAGES_WITHOUT_TORCHVISION, reason="its image processor needs torchvision")
@pytest.mark.parametrize("bits", [0, 4])
def test_a_host_of_smolvlms_class_is_trained(folder: Path, tmp_path: Path, bits: int) -> None:
    run(recipe(folder, "any-vlm", f"host={folder / 'idefics3'}", f"bits={bits}"), tmp_path / "out")
    model, _ = reopened(tmp_path / "out")
    assert isinstance(model, PeftModel)


@pytest.mark.parametrize(("family", "bits"), [("internlm2", 4), ("phi3", 8), ("phi3", 0)])
def test_a_published_checkpoint_is_trained_on(
    folder: Path, tmp_path: Path, family: str, bits: int
) -> None:
    from family.published.folders import published_folder

    host = published_folder(tmp_path / "host", family)
    policy = "{policy: trol_mixer, sharing: shared}"
    settings = (f"host={host}", f"policy={policy}", f"bits={bits}", "precision=fp32")
    settings = recipe(folder, "any-vlm", *settings)
    before, _ = opened(settings, None)
    run(settings, tmp_path / "out")
    after, _ = reopened(tmp_path / "out")
    gates = [attached(model)[0].get_parameter(GATE).detach() for model in (before, after)]
    assert 0 < (gates[0] - gates[1]).abs().max() < 1e-2


@pytest.mark.parametrize("name", ["trol-1.8b"])
def test_updates_of_full_weights_are_merged(folder: Path, tmp_path: Path, name: str) -> None:
    settings = recipe(folder, name, "bits=0", "precision=fp32")
    run(settings, tmp_path / "out")
    model = TrolForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert not any("lora_" in key for key in model.state_dict())
    assert TrolProcessor.from_pretrained(tmp_path / "out").tokens_per_image > 0


@pytest.mark.parametrize("name", ["trol-1.8b", "trol-3.8b"])
def test_a_composed_model_computes_what_its_parts_do(folder: Path, name: str) -> None:
    """The decoder and the tower inside are those of the folders, at the published resolution."""
    from transformers import AutoModel, AutoModelForCausalLM

    settings = recipe(folder, name, "bits=0", "precision=fp32")
    model, processor = opened(settings, None)
    size = model.config.vision_config.image_size
    assert size in (490, (448, 448))
    tower = AutoModel.from_pretrained(settings.preset["vision"]).state_dict()
    inner = model.model.vision_tower.state_dict()
    same = {key for key in tower if key in inner and torch.equal(tower[key], inner[key])}
    assert len(set(tower) - same) <= 2  # the position table, and its buffer of numbers
    if name == "trol-3.8b":
        text = AutoModelForCausalLM.from_pretrained(settings.preset["text"]).eval()
        ids = torch.tensor([[3, 9, 17, 4, 21]])
        from trol import depth

        with torch.no_grad(), depth(model.eval(), "plain"):
            assert torch.allclose(model(input_ids=ids).logits, text(input_ids=ids).logits)
    assert processor.image_token_id == model.config.image_token_id


def joined(folder: Path, place: Path, data: str, *overrides: str) -> Recipe:
    """smol-vlm of small parts: one step in each stage, four image tokens a picture."""
    tower, text = parts.tower(place / "tower", "dinov2"), parts.decoder(place / "text")
    named = folder / "seen" / "chat.jsonl" if data == "chats" else data
    stages = [
        f"stages.{stage}.{setting}"
        for stage in ("align", "step1", "step2")
        for setting in ("steps=1", "batch=2", f"data={named}", "warmup_steps=0")
    ]
    size = ("preset.image_size=16", "preset.downsample_ratio=0.5", "precision=fp32")
    models = (f"preset.vision={tower}", f"preset.text={text}")
    return resolve("smol-vlm", [*models, *size, *stages, *overrides])


@pytest.mark.parametrize("data", ["captions", "boards", "chats"])
def test_pretrained_parts_learn_together(folder: Path, tmp_path: Path, data: str) -> None:
    """What a stage trains moves, and the tower stays."""
    settings = joined(folder, tmp_path, data)
    before, start = opened(settings, None)[0].state_dict(), None
    for name, stage in settings.stages.items():
        run(settings, tmp_path / name, start=start, only=[name])
        start = tmp_path / name
        after = TrolForConditionalGeneration.from_pretrained(start).state_dict()
        moved = {part_of(key) for key in before if not torch.equal(before[key], after[key])}
        assert moved == set(stage.train)
        before = after


def test_adapters_of_quantised_parts_open_as_they_were_trained(
    folder: Path, tmp_path: Path
) -> None:
    settings = joined(folder, tmp_path, "boards", "bits=4")
    assert run(settings, tmp_path / "out")["steps"] == 3
    batches = []
    for _ in range(2):
        model, processor = reopened(tmp_path / "out")
        data = stage_data(model, processor, settings.stages["step2"], 0)
        with torch.no_grad():
            batches.append(data.reader(**data.collate([0, 1]))["loss"])
    assert isinstance(model, PeftModel)
    assert processor.tokens_per_image == 4
    assert torch.equal(*batches)  # nothing that is random anew: projector, positions, gates


def test_published_settings_are_those_of_the_paper() -> None:
    for name, bits in (("trol-1.8b", 4), ("trol-3.8b", 8), ("trol-7b", 4)):
        settings = resolve(name)
        assert (settings.bits, settings.precision, settings.checkpointing) == (bits, "bf16", True)
        for stage in settings.stages.values():
            assert (stage.learning_rate, stage.final_rate) == (1e-4, 1e-6)
            assert (stage.epochs, stage.batch, stage.schedule) == (1, 768, "cosine")
        assert settings.stages["step1"].train == ("projector", "mixers")
        assert (settings.stages["step2"].lora, settings.stages["step2"].lora_alpha) == (64, 64)


def test_a_published_size_needs_no_weights_for_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from family.small import internlm2
    from trol.family import composition

    small = internlm2().config
    small.text_config.vocab_size = 512
    monkeypatch.setitem(composition.PUBLISHED, "trol-1.8b", lambda: small)
    settings = resolve("trol-1.8b", ["preset={name: trol-1.8b}", "bits=0", "precision=fp32"])
    model, processor = opened(settings, None)
    stage = Stage(train=("projector", "mixers"), data="boards", steps=1, batch=2, boards=2)
    data = stage_data(learner_of(model, stage), processor, stage, 0)
    assert data.reader(**data.collate([0, 1]))["loss"].isfinite()


def test_a_batch_is_divided_among_parts_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve("trol-1.8b")
    stage = sized(settings.stages["step1"], range(7681))
    assert stage.steps == 11
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert device_batch(stage) == 16
    assert stage.accumulate == 6
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(UsageError, match="a multiple of 42"):
        device_batch(stage)


def test_a_host_that_cannot_be_is_told(folder: Path, tmp_path: Path) -> None:
    bert = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    t5 = T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        from shutil import copy

        for file in ("tokenizer.json", "tokenizer_config.json"):
            copy(folder / "llm" / file, tmp_path / name / file)
    for host, message in (
        (tmp_path / "bert", "no list of decoder layers"),
        (tmp_path / "t5", "no model can be opened"),
        (folder / "clip", "no model can be opened"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises((HostError, UsageError), match=message):
            opened(resolve("any-llm", [f"host={host}"]), None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset.name=trol-2b"], "Did you mean 'trol-"),
        (["preset.txt=x"], "Did you mean 'text'"),
        (["preset.vision=llm"], "is a 'llama', but this preset has a 'clip_vision_model'"),
        (["preset.text=llm"], "is a 'llama', but this preset has a 'trol_internlm2'"),
        (["preset.vision=nowhere"], "no vision tower can be opened"),
        (["preset.text=nowhere"], "no text decoder can be opened"),
    ],
)
def test_a_preset_that_cannot_be_is_told(folder: Path, overrides: list[str], message: str) -> None:
    known = ("llm", "nowhere")
    placed = [
        f"{key}={folder / value}" if value in known else f"{key}={value}"
        for key, value in (one.split("=") for one in overrides)
    ]
    with pytest.raises((HostError, UsageError), match=message):
        opened(recipe(folder, "trol-1.8b", *placed), None)


def test_a_policy_that_is_trained_is_not_replaced() -> None:
    with pytest.raises(UsageError, match="write the first into the recipe"):
        opened(resolve("any-vlm", ["host=trol-tiny", "policy.passes=3"]), None)
    policy = {"policy": "trol_mixer", "passes": 2, "scope": "question", "training_scope": "all"}
    settings = resolve("any-vlm", ["host=trol-tiny", f"policy={policy}", "precision=fp32"])
    model, processor = opened(settings, None)
    stage = Stage(train=("projector",), data="boards", steps=1, batch=2, boards=2)
    assert stage_data(learner_of(model, stage), processor, stage, 0).rows


def test_data_that_do_not_fit_the_host_are_told(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = opened(recipe(folder, "any-llm", "precision=fp32"), None)

    def data_of(data: object, **settings):
        stage = Stage(train=("mixers",), data=str(data), steps=1, **settings)
        return stage_data(learner_of(model, stage), tokenizer, stage, 0)

    with pytest.raises(UsageError, match="are made for TroL models"):
        data_of("boards")
    with pytest.raises(UsageError, match="to read conversations from"):
        data_of(tmp_path / "none.jsonl")
    seen = data_of(folder / "seen" / "chat.jsonl")
    with pytest.warns(UserWarning, match=r"left out chat\.jsonl, row \d: .*host reads text alone"):
        assert len(seen.collate([0, 1])["input_ids"]) == 2
    long = data_of(folder / "read" / "chat.jsonl", max_tokens=5)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match=r"none of the 8 rows .*row 0: .*at most 5 are learnt from"),
    ):
        long.collate([0])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        data_of(folder / "read" / "chat.jsonl")


def test_a_host_is_given_the_template_of_a_file(folder: Path, tmp_path: Path) -> None:
    """Its text is in the recipe from then on, so that the file may go."""
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    settings = recipe(folder, "any-llm", "bits=0", "precision=fp32", f"chat_template={file}")
    file.unlink()
    assert settings.chat_template == text
    assert opened(settings, None)[1].chat_template == text


def test_labels_are_the_answers_and_no_more(folder: Path) -> None:
    for name in ("any-llm", "any-vlm", "trol-1.8b"):
        settings = recipe(folder, name, "bits=0", "precision=fp32")
        model, processor = opened(settings, None)
        data = stage_data(
            learner_of(model, settings.stages["step1"]), processor, settings.stages["step1"], 0
        )
        batch = data.collate([data.rows[0], data.rows[1]])
        tokenizer = getattr(processor, "tokenizer", processor)
        for row, wanted in enumerate((("7", "red"), ("red", "nothing"))):
            labels = batch["labels"][row]
            answers = tokenizer.decode(labels[labels >= 0])
            for word in wanted:
                assert word in answers, (name, answers)
            assert "which" not in answers
