"""`unimoe convert compose`: parts of every kind become one dense model that computes what they compute."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_checks
import pytest
import recipe_checks
import tiny_media
import tiny_parts
import tiny_training
import torch
from tiny_parts import beats_of
from transformers import AutoModel, CLIPVisionModel

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.checkpoints.checkpoint_reader import Checkpoint
from unimoe.conversion.composing.compose import ComposeOptions, Ingredients, plan_composition, run_composition
from unimoe.errors import ConversionError
from unimoe.processing.processing_unimoe import UniMoeProcessor
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.recipe.recipe_file import load_recipe

SMALL = {"speech_tokens": 4, "sound_tokens": 3}
STAGE_1 = Path(__file__).parents[2] / "runs" / "unimoe_7b" / "1_align_speech.yaml"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parts.every_part(tmp_path_factory.mktemp("parts"))


def compose(out: Path, parts: Path, language_model: str = "llama", options: Any = None, **others: Any) -> Any:
    """The composed model; parts are named by their folder among the parts."""
    named = {k: str(parts / v) if isinstance(v, str) and v != "new" else v for k, v in others.items()}
    ingredients = Ingredients(str(parts / language_model), **named)
    plan = plan_composition(ingredients, ComposeOptions(**{**SMALL, **(options or {})}))
    run_composition(plan, out, progress=False)
    return UniMoeForCausalLM.from_pretrained(out).eval()


@pytest.fixture(scope="module")
def everything(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP, Whisper and BEATs around the LLaMA."""
    out = tmp_path_factory.mktemp("composed") / "dense"
    compose(out, parts, vision_tower="clip", speech_tower="whisper", **beats_of(parts))
    return out


def test_text_has_the_logits_of_the_language_model(parts: Path, everything: Path) -> None:
    source = tiny_parts.language_model(parts / "again")
    ours = UniMoeForCausalLM.from_pretrained(everything)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source(ids).logits
        assert (ours(ids).logits[..., : expected.shape[-1]] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", tiny_parts.VISION_KINDS)
def test_pictures_have_the_states_of_the_vision_tower(kind: str, parts: Path, tmp_path: Path) -> None:
    model = compose(tmp_path / "dense", parts, vision_tower=kind)
    processor = UniMoeProcessor.from_pretrained(tmp_path / "dense")
    tower = (CLIPVisionModel if kind == "clip" else AutoModel).from_pretrained(parts / kind).eval()
    messages = [{"role": "user", "content": [{"type": "image", "image": tiny_media.picture()}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        seen = model.model.encode_image(inputs["pixel_values"])
    expected = {
        "clip": lambda: states[-2][:, 1:],
        "siglip": lambda: states[-2],
        "dinov2": lambda: states[-2][:, 1:],
        "mobilenet": lambda: states[-1].flatten(2).transpose(1, 2),
    }[kind]()
    assert torch.equal(seen, expected)
    assert model(**inputs).logits.isfinite().all()
    assert processor.image_tokens == expected.shape[1]


def test_speech_goes_through_whisper_and_starts_as_its_decoder(parts: Path, everything: Path) -> None:
    whisper = tiny_parts.speech_tower(parts / "again-whisper")
    model = UniMoeForCausalLM.from_pretrained(everything).eval()
    features = torch.randn(1, 80, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = whisper.model.encoder(features).last_hidden_state
        assert torch.equal(model.model.encode_speech(features), states)
        queries = torch.zeros(1, 4, 32)
        decoded = whisper.model.decoder(inputs_embeds=queries, encoder_hidden_states=states).last_hidden_state
        connector = model.model.speech_connector
        assert torch.allclose(connector(states), connector.projector(decoded), atol=1e-6)
    assert not connector.query_tokens.any()


def test_queries_may_start_as_whispers_prompt_in_short_windows(parts: Path, tmp_path: Path) -> None:
    whisper = tiny_parts.speech_tower(tmp_path / "whisper")
    options = {"speech_queries": "prompt", "window_seconds": 1}
    model = compose(tmp_path / "dense", parts, speech_tower="whisper", options=options)
    words = whisper.model.decoder.embed_tokens.weight[-2:]
    assert torch.equal(model.model.speech_connector.query_tokens[0, :2], words)
    assert not model.model.speech_connector.query_tokens[0, 2:].any()
    table = whisper.model.encoder.embed_positions.weight
    assert torch.equal(model.model.speech_tower.embed_positions.weight, table[:50])
    assert model.model.encode_speech(torch.randn(1, 80, 100)).shape == (1, 50, 32)
    assert UniMoeProcessor.from_pretrained(tmp_path / "dense").feature_extractor.window_seconds == 1


def test_sounds_go_through_beats_or_the_speech_tower(parts: Path, everything: Path, tmp_path: Path) -> None:
    beats = UniMoeForCausalLM.from_pretrained(parts / "beats" / "ours").model.audio_tower
    composed = UniMoeForCausalLM.from_pretrained(everything).model
    bank = torch.randn(1, 98, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(composed.encode_sound(bank), beats(bank).last_hidden_state, atol=1e-5)
    shared = compose(tmp_path / "dense", parts, speech_tower="whisper", options={"sound_connector": "mlp"})
    assert shared.config.audio_config is None
    assert shared.model.sound_connector(torch.zeros(1, 100, 32)).shape == (1, 3, 32)
    processor = UniMoeProcessor.from_pretrained(tmp_path / "dense")
    assert processor.feature_extractor.sound_features == "mel"


def test_a_trained_qformer_is_taken(parts: Path, tmp_path: Path) -> None:
    trained = tiny_parts.qformer(tmp_path / "q.pt", queries=3)
    (tmp_path / "q.pt").rename(tmp_path / "qformer.bin")
    model = compose(tmp_path / "dense", parts, qformer_weights=str(tmp_path / "qformer.bin"), **beats_of(parts))
    connector = model.model.sound_connector
    assert all(torch.equal(connector.qformer.state_dict()[n], t) for n, t in trained.state_dict().items())
    assert connector.query_tokens.eq(1).all()


def test_a_llava_brings_tower_and_projection(parts: Path, tmp_path: Path) -> None:
    llava = tiny_parts.llava(tmp_path / "llava")
    model = compose(tmp_path / "dense", parts, "llava", speech_tower="whisper")
    image = model.config.image_token_id
    ids = torch.tensor([[5, 6, *[image] * 4, 7, 8]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=pixels).logits
        assert (model(input_ids=ids, pixel_values=pixels).logits - expected).abs().max() <= 1e-5
    processor = UniMoeProcessor.from_pretrained(tmp_path / "dense")
    assert processor.tokenization == "spaced"
    assert "USER" in processor.chat_template
    assert model.config.text_config.vocab_size == llava.config.text_config.vocab_size


def test_choices_about_a_llava_act(parts: Path, tmp_path: Path) -> None:
    options = {"vision_feature_layer": -1, "vision_token_grid": 1, "image_aspect_ratio": "pad", "dtype": torch.float16}
    model = compose(tmp_path / "dense", parts, "llava", image_projector="new", options=options)
    assert (model.config.vision_feature_layer, model.dtype) == (-1, torch.float16)
    processor = UniMoeProcessor.from_pretrained(tmp_path / "dense")
    assert (processor.image_tokens, processor.image_aspect_ratio) == (1, "pad")
    receipt = json.loads((tmp_path / "dense" / "receipt.json").read_text())
    assert receipt["targets"]["model.image_connector.layers.0.weight"]["made_of"] == ["new: drawn, seed 0"]
    with pytest.raises(ConversionError, match="does not take pictures of 20 x 20"):
        plan_composition(Ingredients(str(parts / "llava")), ComposeOptions(image_size=20))


def test_a_projector_trained_apart_is_taken(parts: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (32, 32), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    weights = {f"model.mm_projector.{n}": torch.randn(s, generator=generator) for n, s in shapes.items()}
    torch.save(weights, tmp_path / "mm_projector.bin")
    projector = str(tmp_path / "mm_projector.bin")
    model = compose(tmp_path / "dense", parts, vision_tower="clip", image_projector=projector)
    for ours, theirs in ((0, 0), (1, 2)):
        layer = model.model.image_connector.layers[ours]
        assert torch.equal(layer.weight, weights[f"model.mm_projector.{theirs}.weight"])
        assert torch.equal(layer.bias, weights[f"model.mm_projector.{theirs}.bias"])


def test_llavas_own_layout_gives_its_projector(parts: Path, tmp_path: Path) -> None:
    source = tiny_parts.language_model(tmp_path / "own", metaspace=True, rms_norm_eps=1e-3)
    projector = {
        f"model.mm_projector.{i}.{kind}": torch.ones(*shape) for i in (0, 2) for kind, shape in _LINEAR.items()
    }
    source.save_pretrained(tmp_path / "own", state_dict={**source.state_dict(), **projector})
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "model_type": "llava", "mm_hidden_size": 32}))
    model = compose(tmp_path / "dense", tmp_path, "own", vision_tower=str(parts / "clip"))
    assert model.config.text_config.rms_norm_eps == 1e-3
    assert model.model.image_connector.layers[1].weight.eq(1).all()
    plan = plan_composition(Ingredients(str(tmp_path / "own")))
    assert plan.config.image_connector is None
    assert any("projector is left out" in note for note in plan.notes)


_LINEAR = {"weight": (32, 32), "bias": (32,)}


def test_parts_are_added_one_after_another(parts: Path, everything: Path, tmp_path: Path) -> None:
    compose(tmp_path / "sees", parts, vision_tower="clip")
    compose(tmp_path / "hears", tmp_path, "sees", speech_tower=str(parts / "whisper"))
    with pytest.raises(ConversionError, match=r"windows are of 2 s\. Leave it out"):
        compose(tmp_path / "no", tmp_path, "hears", options={"window_seconds": 1}, **beats_of(parts))
    model = compose(tmp_path / "all", tmp_path, "hears", **beats_of(parts))
    once = Checkpoint(everything)
    assert set(once.tensors) == set(Checkpoint(tmp_path / "all").tensors)
    state = model.state_dict()
    assert all(torch.equal(state[name], once.read(name)) for name in once.tensors)
    assert UniMoeProcessor.from_pretrained(tmp_path / "all").chat_template.count("ASSISTANT")


def test_what_is_new_depends_on_the_seed_alone(parts: Path, everything: Path, tmp_path: Path) -> None:
    again = compose(tmp_path / "0", parts, vision_tower="clip")
    other = compose(tmp_path / "1", parts, vision_tower="clip", options={"seed": 1})
    first = UniMoeForCausalLM.from_pretrained(everything).model.image_connector.layers[0].weight
    assert torch.equal(again.model.image_connector.layers[0].weight, first)
    assert not torch.equal(other.model.image_connector.layers[0].weight, first)
    assert abs(first.std().item() - 0.02) < 0.004
    normed = compose(tmp_path / "2", parts, vision_tower="clip", options={"output_norm": True})
    scale = Checkpoint(parts / "llama").read("model.embed_tokens.weight").square().mean().sqrt()
    assert torch.allclose(normed.model.image_connector.output_norm.weight, scale)


def test_new_words_start_near_the_mean_and_are_not_written(everything: Path, parts: Path) -> None:
    model = UniMoeForCausalLM.from_pretrained(everything)
    words = len(tiny_media.plain_tokenizer())
    table = model.model.language_model.embed_tokens.weight
    assert (table[words:] - table[:words].mean(dim=0)).abs().max() < 0.1 * table[:words].std()
    assert len(table) == 320
    assert len(table[words:].unique(dim=0)) == len(table) - words >= 4
    ids = model.config.placeholder_ids
    assert model.generation_config.suppress_tokens == sorted(ids.values())
    assert model.generation_config.eos_token_id == 2
    plan = plan_composition(Ingredients(str(parts / "llama")), ComposeOptions(chat_template="chatml"))
    end = plan.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plan.generation.eos_token_id == [2, end]


def test_the_receipt_says_what_came_from_where(everything: Path, parts: Path) -> None:
    receipt = json.loads((everything / "receipt.json").read_text())
    assert [part["role"] for part in receipt["parts"]] == [
        "language model",
        "vision tower",
        "speech tower",
        "sound tower",
    ]
    for part, name in zip(receipt["parts"], ("llama", "clip", "whisper"), strict=False):
        stored = set(Checkpoint(parts / name).tensors)
        assert part["consumed"] + len(part["dropped"]) == len(stored)
    assert set(receipt["targets"]) == set(Checkpoint(everything).tensors)
    new = [n for n, target in receipt["targets"].items() if target["made_of"][0].startswith("new: ")]
    assert {name.split(".")[1] for name in new} == {"image_connector", "speech_connector", "sound_connector"}
    assert receipt["features"] == {"image": 4, "video": 4, "speech": 4, "sound": 3}
    card = (everything / "README.md").read_text()
    assert "| vision tower | `clip` | clip_vision_model, states -2 of width 32 | apache-2.0 |" in card
    texts = [path.read_text() for path in (*everything.glob("*.json"), everything / "README.md")]
    assert not any(str(parts) in text for text in texts)


def test_the_command_prints_a_plan_and_a_receipt(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dense"
    command = ["convert", "compose", "--language-model", parts / "llama", "--out", out, "--dtype", "bf16"]
    command += ["--vision-tower", parts / "mobilenet", "--image-grid", 1, "--video-pooling", "none"]
    assert cli.main([str(word) for word in command]) == 0
    printed = capsys.readouterr().out
    assert "1 per picture, 8 per video" in printed
    assert printed.index("Plan") < printed.index("Receipt")
    stored = Checkpoint(out).tensors.values()
    assert {info.dtype for info in stored} == {torch.bfloat16, torch.int64}
    assert cli.main([str(word) for word in command]) == 2  # it is there already


FRESH = """
import sys

sys.path.insert(0, sys.argv[1])
import hub_checks
import torch

sys.meta_path.insert(0, hub_checks.HideUnimoe())
from transformers import AutoModelForCausalLM, AutoProcessor

folder, out = sys.argv[2:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
media = {"type": "image", "image": hub_checks.picture()}, {"type": "audio", "audio": hub_checks.clip()}
inputs = processor.apply_chat_template(hub_checks.chat(*media), tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
torch.save({"logits": logits, "modules": [n for n in sys.modules if n.split(".")[0] == "unimoe"]}, out)
"""


def test_a_fresh_process_without_unimoe_loads_it(everything: Path, tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment = kept | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH, str(Path(__file__).parents[1]), everything, tmp_path / "seen"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = torch.load(tmp_path / "seen")
    assert seen["modules"] == []
    model = UniMoeForCausalLM.from_pretrained(everything).eval()
    processor = UniMoeProcessor.from_pretrained(everything)
    media = {"type": "image", "image": hub_checks.picture()}, {"type": "audio", "audio": hub_checks.clip()}
    messages = hub_checks.chat(*media)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, seen["logits"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tower", "shared"), [("clip", False), ("dinov2", True), ("mobilenet", True)])
def test_stage_1_trains_it_and_it_becomes_sparse(tower: str, shared: bool, parts: Path, tmp_path: Path) -> None:
    sound = {"options": {"sound_connector": "mlp", "speech_connector": "mlp"}} if shared else beats_of(parts)
    compose(tmp_path / "dense", parts, vision_tower=tower, speech_tower="whisper", **sound)
    data = tiny_training.write_jsonl(tmp_path / "data", per_modality=2)
    sizes = {"steps": 2, "warmup_steps": 0, "batch_size": 2, "gradient_accumulation_steps": 1, "log_every": 1}
    changes = {f"align.{name}": value for name, value in sizes.items()}
    changes |= {"model": tmp_path / "dense", "data": [str(data)], "media_root": "null", "out": tmp_path / "out"}
    changes |= {"align.modalities": ["image", "speech", "sound"], "align.learning_rate": 0.01}
    if shared:
        changes["align.train"] = ["connectors"]  # an mlp has no aligner
    recipe = load_recipe(STAGE_1, [f"{field}={value}" for field, value in changes.items()])
    (report,) = run_curriculum(recipe, progress_bar=False)
    assert math.isfinite(report.loss_last)
    assert recipe_checks.changed(tmp_path / "dense", Path(report.model)) == {"connector"}
    out = tmp_path / "sparse"
    assert cli.main(["convert", "upcycle", report.model, "--out", str(out), "--groups", "five", "--experts", "6"]) == 0
    assert UniMoeForCausalLM.from_pretrained(out).config.text_config.num_experts == 6
    assert (out / "processor_config.json").exists()
