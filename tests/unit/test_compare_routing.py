"""The routing comparison: variants that are equally wide and start alike, a run that goes on, and an honest table."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_training
import torch

from unimoe.errors import RecipeError
from unimoe.quickstart import compare_routing, stages
from unimoe.quickstart.compare_routing import Comparison, main
from unimoe.quickstart.comparison_table import print_table, table_rows
from unimoe.quickstart.routing_variants import VARIANTS, decoder_parameters, make_variant
from unimoe.quickstart.run import Quickstart
from unimoe.trainers.caches.encoder_cache import EncoderCache

MIX = {"image": 2.0, "speech": 1.0, "sound": 1.0, "text": 1.0}


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_training.processor()


@pytest.fixture(scope="module")
def dense(processor: Any) -> Any:
    return tiny_training.model(processor)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda variant: variant.name)
def test_variants_are_as_wide_as_the_dense_model_and_start_as_it(variant: Any, processor: Any, dense: Any) -> None:
    model = make_variant(variant, dense, seed=1)
    active = decoder_parameters(model.config).active
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert active - routers == decoder_parameters(dense.config).active == decoder_parameters(dense.config).total
    assert decoder_parameters(model.config).total > active
    image, speech = processor.image_token_id, processor.audio_token_id
    ids = torch.tensor([[5, *[image] * 4, 9, 12, *[speech] * 3, *[processor.sound_token_id] * 2, 7, 30]])
    inputs = {"input_ids": ids, **tiny.media(3, images=1, windows=1)}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_seeds_draw_other_routers(dense: Any) -> None:
    gates = [
        make_variant(VARIANTS[3], dense, seed).model.language_model.layers[1].mlp.gate.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


# ---- a whole comparison, with tiny parts in place of the quickstart's


@pytest.fixture
def bench(processor: Any, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a comparison whose dense model, data and states are tiny; `runs` in it counts what was trained."""
    samples = tiny_training.samples(tmp_path / "media", per_modality=2)
    for sample in samples:
        for message in sample["messages"]:
            for item in message["content"]:
                if "path" in item:
                    item["path"] = str(tmp_path / "media" / item["path"])
    dense.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    cache = EncoderCache(tmp_path / "states", dense, processor)
    cache.build(samples)
    monkeypatch.setattr(Quickstart, "training_samples", lambda _: samples)
    monkeypatch.setattr(Quickstart, "heldout_samples", lambda _: samples)
    monkeypatch.setattr(Quickstart, "precision", lambda _: "float32")
    monkeypatch.setattr(stages, "MIX", MIX)
    shared = (tmp_path / "dense", processor, (cache, cache))
    monkeypatch.setattr(compare_routing, "_shared_stages", lambda _: shared)
    train, made = compare_routing.run_training, tmp_path / "made"

    def counted(*arguments: Any, **options: Any) -> Any:
        with made.open("a") as file:
            file.write(f"{arguments[2].name}\n")
        return train(*arguments, **options)

    monkeypatch.setattr(compare_routing, "run_training", counted)
    return tmp_path / "out"


def test_a_comparison_goes_on_where_it_stopped(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(bench), "--steps", "2", "--seeds", "1"]
    assert main(command) == 0
    assert main([*command[:-1], "2"]) == 0
    made = (bench.parent / "made").read_text().splitlines()
    assert made == [variant.name for variant in VARIANTS] * 2
    results = json.loads((bench / "comparison.json").read_text())["results"]
    assert [(result["variant"], result["seed"]) for result in results] == [
        (variant.name, seed) for seed in (0, 1) for variant in VARIANTS
    ]
    assert all(set(result["accuracy"]) == set(MIX) and result["steps"] == 2 for result in results)
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[-5:]] == [variant.name for variant in VARIANTS]
    assert table[-1].count(" ± ") == len(MIX) + 2
    assert main(["--out", str(bench), "--steps", "3"]) == 2
    assert "holds a comparison with steps = 2, now it is 3" in capsys.readouterr().out


def test_a_start_that_is_no_quickstart_is_named(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no model after stage 1"):
        compare_routing.compare_routing(Comparison(bench, start=tmp_path / "nothing"))


def test_the_table_shows_means_and_deviations(capsys: pytest.CaptureFixture[str]) -> None:
    def result(name: str, seed: int, image: float, text: float) -> dict[str, Any]:
        size = {"total": 7_320_000, "active": 3_780_000}
        accuracy = {"text": text, "image": image}
        return {"variant": name, "seed": seed, "accuracy": accuracy, "loss": image, "parameters": size, "steps": 9}

    results = [result("B", 0, 0.5, 0.2), result("A", 0, 0.1, 0.1), result("B", 1, 0.7, 0.4), result("A", 1, 0.1, 0.1)]
    header, first, second = table_rows(results)
    assert header == ["model", "parameters", "active", "image", "text", "mean", "loss"]
    deviation = statistics.stdev([0.5, 0.7])
    assert first == [
        "B",
        "7.32 M",
        "3.78 M",
        f"60.0 ± {100 * deviation:.1f}",
        f"30.0 ± {100 * deviation:.1f}",
        f"45.0 ± {100 * deviation:.1f}",
        f"0.600 ± {deviation:.3f}",
    ]
    assert second[3:] == ["10.0 ± 0.0", "10.0 ± 0.0", "10.0 ± 0.0", "0.100 ± 0.000"]
    assert table_rows(results[:1])[1][3:] == ["50.0", "20.0", "35.0", "0.500"]
    print_table({"results": results, "seconds": 90.0})
    assert "over 2 seeds, 9 steps each,\n1.5 minutes in all" in capsys.readouterr().out
