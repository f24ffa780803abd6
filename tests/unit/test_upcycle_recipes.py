"""`unimoe convert upcycle` with every published way to start: what is written, measured, refused and said of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import SIZES, dense_from, llama
from tiny_tokenizer import WORDS, save_word_tokenizer
from transformers import Phi3Config, Phi3ForCausalLM

from unimoe import UniMoeForCausalLM, cli
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.upcycle import upcycle_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    save_word_tokenizer(tmp_path / "dense")
    return tmp_path / "dense"


def upcycle(source: Path, *arguments: object) -> int:
    out = source.parent / "sparse"
    return cli.main(["convert", "upcycle", str(source), "--out", str(out), "--layers", "even", *map(str, arguments)])


def receipt(source: Path) -> dict[str, Any]:
    return json.loads((source.parent / "sparse" / "receipt.json").read_text())


SHUFFLED = json.dumps(
    {
        "vision": {"experts": [2, 0, 3, 1, 5, 4], "modalities": ["image", "video"]},
        "language": {"experts": [7, 3, 5, 2, 6, 4], "modalities": ["text", "speech", "sound"]},
    }
)
EXACT: dict[str, list[object]] = {
    "shared": ["--shared", 2],
    "granular": ["--experts", 6, "--top-k", 3, "--granularity", 3],
    "granular and shared": ["--experts", 8, "--top-k", 4, "--granularity", 2, "--shared", 1],
    "moiie": ["--groups", "moiie"],
    "moiie granular": ["--groups", "moiie", "--experts", 8, "--granularity", 2],
    "separate": ["--groups", "separate"],
    "five": ["--groups", "five", "--experts", 10],
    "modality": ["--groups", "modality", "--experts", 2, "--top-k", 1],
    "cluster": ["--router-init", "cluster"],
    "granular groups out of order": ["--groups", SHUFFLED, "--experts", 8, "--granularity", 2],
    "weights that sum to one unasked": ["--top-k", 4, "--routing", '{"norm_topk_prob": false}'],
    "granular cluster": ["--router-init", "cluster", "--experts", 6, "--top-k", 3, "--granularity", 3],
}
INEXACT: dict[str, list[object]] = {
    "noise": ["--noise", 0.05],
    "drop": ["--drop-ratio", 0.25],
    "drop and noise of parts": [
        "--experts",
        8,
        "--top-k",
        4,
        "--granularity",
        2,
        "--drop-ratio",
        0.2,
        "--noise",
        0.01,
    ],
    "null": ["--null", 1, "--router-init", "normal"],
    "weights that sum to less": ["--routing", '{"norm_topk_prob": false}'],
    "slices": ["--granularity", 3, "--split", "slices", "--shared", 1],
}


@pytest.mark.parametrize("name", EXACT)
def test_ways_that_keep_the_function_are_proven_to(name: str, source: Path) -> None:
    assert upcycle(source, *EXACT[name]) == 0
    comparison = receipt(source)["comparison"]
    assert receipt(source)["exact"]
    assert comparison["max_abs_logit_difference"] <= 1e-5 * max(1, comparison["max_abs_logit"])
    assert comparison["each_expert_difference"] <= 1e-5 * max(1, comparison["max_abs_logit"])


@pytest.mark.parametrize("name", INEXACT)
def test_ways_that_change_the_function_need_leave_and_show_both_gaps(
    name: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upcycle(source, *INEXACT[name], "--allow-gap", 1e-9) == 2
    error = capsys.readouterr().err
    assert "is expected of this way, which changes the function" in error
    assert not (source.parent / "sparse").exists()
    assert upcycle(source, *INEXACT[name], "--allow-gap", error.rsplit("--allow-gap ", 1)[1].rstrip(".\n")) == 0
    written = receipt(source)
    measured, expected = (
        written["comparison"][field] for field in ("max_abs_logit_difference", "expected_difference")
    )
    assert 0.2 < measured / expected < 5
    assert not written["exact"]
    assert written["allowed_gap"] > measured > 1e-3


@pytest.mark.parametrize("name", INEXACT)
def test_ways_that_change_the_function_are_refused_before_anything_is_done(
    name: str, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimoe.conversion.checkpoints.read_back.write_checkpoint", None)
    assert upcycle(source, *INEXACT[name]) == 2
    shown = capsys.readouterr()
    assert "changes     the function: " in shown.out
    assert "The model would not start as its source, because of " in shown.err
    assert "with --allow-gap X" in shown.err


def test_scaled_weights_that_bfloat16_cannot_hold(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A third of a copy is scaled by 3: float32 takes that up to its own rounding, bfloat16 does not."""
    llama().bfloat16().save_pretrained(source)
    thirds = ["--experts", 6, "--top-k", 3, "--granularity", 3]
    assert upcycle(source, *thirds) == 2
    assert "3 in bfloat16, which cannot hold 3 times a weight (fp32 can" in capsys.readouterr().err
    assert upcycle(source, *thirds, "--dtype", "fp32") == 0
    assert receipt(source)["exact"]
    assert receipt(source)["comparison"]["max_abs_logit_difference"] < 1e-5
    shutil.rmtree(source.parent / "sparse")
    assert upcycle(source, *thirds, "--allow-gap", "inf") == 0
    comparison = receipt(source)["comparison"]
    assert not receipt(source)["exact"]
    assert 0.2 < comparison["max_abs_logit_difference"] / comparison["expected_difference"] < 5
    shutil.rmtree(source.parent / "sparse")
    assert upcycle(source, "--experts", 4, "--granularity", 2) == 0
    assert receipt(source)["exact"]


@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
def test_streaming_writes_what_upcycling_in_memory_makes(name: str, source: Path) -> None:
    options = {**EXACT, **INEXACT}[name]
    if "cluster" in options:
        pytest.skip("in memory the rows are the caller's")
    assert upcycle(source, *options, "--allow-gap", "inf", "--seed", 5) == 0
    written = UniMoeForCausalLM.from_pretrained(source.parent / "sparse")
    text = written.config.text_config
    given = dict(zip(options[::2], options[1::2], strict=True))
    expected = upcycle_model(
        dense_from(llama()),
        Sparsity(
            num_experts=text.num_experts,
            num_experts_per_tok=text.num_experts_per_tok,
            sparse_layers=text.sparse_layers,
            expert_groups=text.expert_groups,
            modality_groups=text.modality_groups,
            routing={"num_shared_experts": text.num_shared_experts, "num_null_experts": text.num_null_experts},
            seed=5,
            granularity=given.get("--granularity", 1),
            split=given.get("--split", "virtual-groups"),
            noise=given.get("--noise", 0.0),
            drop_ratio=given.get("--drop-ratio", 0.0),
        ),
    )
    assert expected.state_dict().keys() == written.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(written.state_dict()[key], tensor), key


def test_prompts_reach_their_experts(source: Path, tmp_path: Path) -> None:
    words = ("capital", "leaves", "light", "return")
    (tmp_path / "prompts.json").write_text(json.dumps({str(i): [f"{word} " * 6] for i, word in enumerate(words)}))
    assert upcycle(source, "--router-init", "prompts", "--prompts", tmp_path / "prompts.json") == 0
    model = UniMoeForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    for expert, word in enumerate(words):
        ids = torch.full((1, 6), WORDS.index(word))
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        assert all((layer[1:].argmax(-1) == expert).all() for layer in logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router-init", "prompts"], "needs --prompts FILE"),
        (["--prompts", "x"], "reads no prompts"),
        (
            ["--groups", "moiie", "--experts", 6],
            "needs a multiple of 4 experts, and there are 6. It goes with --experts 4",
        ),
        (["--groups", "modality"], "needs exactly 2 experts (the preset 'separate' takes more), and there are 4"),
        (["--groups", "modality", "--experts", 2], "choose from 1, and it shall use 2: lower --top-k"),
        (["--groups", "five"], "to share, and there are 4. It goes with --experts 10 --top-k 2"),
        (["--groups", "five", "--experts", 6, "--top-k", 3], "It goes with --experts 10 --top-k 2, for example"),
        (["--granularity", 2, "--routing", '{"router_type": "dynamic"}'], "does not go with router_type 'dynamic'"),
        (["--granularity", 2, "--routing", '{"router_pick": "sample_always"}'], "does not go with router_pick"),
        (["--groups", "mine"], "is no preset (uni-moe, modality,"),
        (["--granularity", 5], "must divide the width"),
        (["--drop-ratio", 2], "from 0 to 1"),
        (["--experts", 0], "num_experts is 0; a sparse layer needs one at least"),
        (["--routing", "router_type=dynamic"], "is neither a JSON object, such as '{\"name\": 1}', nor a file"),
    ],
)
def test_impossible_ways_are_refused(
    options: list[object], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upcycle(source, *options) == 2
    assert message in capsys.readouterr().err
    assert not (source.parent / "sparse").exists()


@pytest.mark.parametrize("gap", ["nan", "-1", "much"])
def test_a_gap_is_a_number(gap: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        upcycle(source, "--noise", 0.1, "--allow-gap", gap)
    assert f"'{gap}' is no number from 0 on, nor inf" in capsys.readouterr().err


def test_a_router_that_reads_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "dense")
    assert upcycle(tmp_path / "dense", "--router-init", "cluster") == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_fused_sources_take_every_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {**SIZES, "sliding_window": 20, "pad_token_id": 0}
    Phi3ForCausalLM(Phi3Config(**fields)).eval().save_pretrained(tmp_path / "dense")
    assert upcycle(tmp_path / "dense", "--experts", 6, "--top-k", 3, "--granularity", 3, "--shared", 1) == 0
    assert receipt(tmp_path / "dense")["exact"]


def test_the_plan_names_what_was_published(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upcycle(source, "--drop-ratio", 0.5, "--noise", 0.1, "--router-init", "cluster", "--allow-gap", "inf") == 0
    printed = capsys.readouterr().out
    for words in ("arXiv 2212.05055", "arXiv 2502.19261", "arXiv 2604.13508", "noise: 0.1", "is expected of this way"):
        assert words in printed
    card = (source.parent / "sparse" / "README.md").read_text()
    assert "arXiv 2502.19261" in card
