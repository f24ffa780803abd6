"""Loss-free balancing: biases that move the choice and never the weights, and what moves them in training."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_training
import torch
import torch.nn.functional as F
from training_bench import Bench

from unimoe import UniMoeForCausalLM
from unimoe.conversion.dense.sources import open_source
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.stream_upcycle import plan_upcycle, run_upcycle
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConfigurationError
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter
from unimoe.trainers.recipe.recipe import LoraSettings
from unimoe.trainers.saving.checkpoints import COMPLETE_FILE
from unimoe.trainers.steps.lora import add_lora
from unimoe.trainers.steps.router_bias import choice_biases, update_choice_biases
from unimoe.trainers.steps.trainable import set_trainable

RATE = 0.01
TOKENS = 40


def router(seed: int = 0, **text: Any) -> UniMoeRouter:
    gate = UniMoeRouter(tiny.text_config(router_bias_update_rate=RATE, **text))
    gate.weight.data = torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(seed))
    return gate.eval()


def hidden(seed: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_bias_changes_the_choice_and_not_the_weights(scoring: str) -> None:
    gate = router(router_scoring=scoring)
    x = hidden()
    gate.choice_bias_C.copy_(torch.tensor([0.0, 2.0, 0.0, -2.0]))
    logits, weights, experts = gate(x)
    assert (experts == 1).any(dim=1).all()  # a score is at most 1
    assert not (experts == 3).any()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


def test_no_bias_opens_another_group() -> None:
    gate = router(**tiny.MOIIE_GROUPS)
    groups = torch.arange(TOKENS) % 2
    gate.choice_bias_C.copy_(torch.tensor([-5.0, -5.0, -5.0, 5.0, 5.0, 5.0]))
    _, weights, experts = gate(hidden(), groups)
    for index, group in enumerate(gate.groups):
        assert set(experts[groups == index].unique().tolist()) <= set(group.experts)
    assert torch.isfinite(weights).all()


def test_biases_move_towards_an_even_load_in_every_group() -> None:
    gate = router(**tiny.MOIIE_GROUPS)
    gate.update_choice_bias(torch.tensor([9.0, 3.0, 6.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(gate.choice_bias_C, RATE * torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))


def test_training_counts_choices_without_padding() -> None:
    gate = router().train()
    x, mask = hidden(), torch.arange(TOKENS) % 4 > 0
    _, _, experts = gate(x, None, mask)
    gate(x[:5])
    counts = torch.bincount(experts[mask].flatten(), minlength=4) + torch.bincount(
        gate.eval()(x[:5])[2].flatten(), minlength=4
    )
    torch.testing.assert_close(gate.load_C, counts.float())
    gate.eval()(x)
    torch.testing.assert_close(gate.load_C, counts.float())


def test_the_model_tells_its_routers_what_is_padding() -> None:
    model = tiny.model(text={"router_bias_update_rate": RATE, "sparse_layers": [0]}).train()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model(input_ids=torch.arange(5, 15).view(2, 5), attention_mask=mask)
    assert float(model.model.language_model.layers[0].mlp.gate.load_C.sum()) == 2 * 8


def test_the_load_becomes_even() -> None:
    """Tokens that all prefer the same experts are spread by the biases alone."""
    gate = router().train()
    gate.weight.data *= 0.1
    gate.bias_update_rate = 0.001
    x = hidden(tokens=400) + 3 * gate.weight[0] / gate.weight[0].norm()
    shares = []
    for _ in range(500):
        gate.load_C = None
        gate(x)
        shares.append(gate.load_C / gate.load_C.sum())
        update_choice_biases(gate)
    # Two choices each: no expert can have more than half of them.
    assert shares[0].max() > 0.45
    assert torch.stack(shares[-100:]).mean(dim=0).max() < 0.27


def test_biases_stay_float32(tmp_path: Path) -> None:
    model = tiny.model(text={"router_bias_update_rate": RATE})
    for bias in choice_biases(model).values():
        bias.fill_(1 / 3)
    model.save_pretrained(tmp_path)
    loaded = UniMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert len(choice_biases(loaded)) == 2
    for bias in choice_biases(loaded).values():
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias, torch.full_like(bias, 1 / 3), rtol=0, atol=0)
    cast = model.to(torch.bfloat16)
    gate = cast.model.language_model.layers[0].mlp.gate
    gate.update_choice_bias(torch.arange(4.0))
    assert gate.choice_bias_C.dtype == torch.float32


def test_upcycling_starts_without_bias(tmp_path: Path) -> None:
    dense = tiny.model(text={"num_experts": 0, "sparse_layers": []})
    dense.save_pretrained(tmp_path / "dense")
    routing = {"router_bias_update_rate": RATE, **tiny.MOIIE_GROUPS}
    groups = {name: routing.pop(name) for name in ("expert_groups", "modality_groups")}
    sparsity = Sparsity(4, 2, (0, 2), routing=routing, **groups)
    run_upcycle(plan_upcycle(open_source(str(tmp_path / "dense")), sparsity), tmp_path / "sparse", progress=False)
    in_memory = upcycle_model(dense, sparsity)
    for sparse in (UniMoeForCausalLM.from_pretrained(tmp_path / "sparse"), in_memory):
        assert len(choice_biases(sparse)) == 2
        assert not any(bias.any() for bias in choice_biases(sparse).values())


def test_without_a_rate_nothing_is_stored() -> None:
    assert not choice_biases(tiny.model())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ({"router_bias_update_rate": -1.0}, "router_bias_update_rate"),
        ({"router_bias_update_rate": 0.1, "router_type": "dynamic"}, "dynamic"),
        ({"router_bias_update_rate": 0.1, "router_pick": "sample"}, "router_pick"),
        ({"router_group_aux_loss_coefs": {"sight": 0.1}}, "sight"),
        ({"router_group_aux_loss_coefs": {"all": -0.1}}, "-0.1"),
        ({"router_aux_loss_layers": "joint", "router_losses_as_released": True}, "router_aux_loss_layers"),
    ],
)
def test_impossible_fields_are_refused(text: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        tiny.text_config(**text)


# --- in training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def biased(bench: Bench, lora: bool = False, roles: tuple[str, ...] = ("router", "connectors")) -> Any:
    model = tiny_training.model(bench.processor, sparse=True, router_bias_update_rate=RATE)
    set_trainable(model, list(roles))
    torch.manual_seed(0)
    return add_lora(model, LoraSettings(rank=2)) if lora else model


def biases(model: Any) -> torch.Tensor:
    return torch.stack([*choice_biases(model).values()])


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_moves_biases_and_resumes_with_them(bench: Bench, tmp_path: Path, lora: bool) -> None:
    whole = bench.trainer(tmp_path / "whole", biased(bench, lora), 6)
    whole.train()
    expected = biases(whole.model)
    assert expected.any()
    # After n steps every bias is a sum of n moves.
    torch.testing.assert_close((expected / RATE).round() * RATE, expected)
    assert expected.abs().max() <= 6 * RATE + 1e-6
    stopped = bench.trainer(tmp_path / "parts", biased(bench, lora), 6, save_strategy="steps", save_steps=3)
    stopped.train()
    (tmp_path / "parts" / "checkpoint-6" / COMPLETE_FILE).unlink()
    resumed = bench.trainer(tmp_path / "parts", biased(bench, lora), 6)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(biases(resumed.model), expected)


def test_accumulated_batches_move_the_biases_once(bench: Bench, tmp_path: Path) -> None:
    """One step over two micro-batches: the move is that of their common load."""
    moves, loads = [], []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = bench.trainer(
            tmp_path,
            biased(bench),
            1,
            warmup_steps=0,
            modality_weights={"text": 1, "image": 0, "speech": 0, "sound": 0},
            **options,
        )
        gate = trainer.model.model.language_model.layers[0].mlp.gate
        update = gate.update_choice_bias
        gate.update_choice_bias = lambda load, update=update: (loads.append(load.clone()), update(load))
        trainer.train()
        moves.append(biases(trainer.model))
    assert len(loads) == 2
    assert torch.equal(loads[0], loads[1])
    assert torch.equal(moves[0], moves[1])
    assert moves[0].abs().max() == pytest.approx(RATE)


def test_a_frozen_router_keeps_its_biases(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(
        tmp_path,
        biased(bench, roles=("connectors",)),
        2,
        modality_weights={"text": 0, "image": 1, "speech": 1, "sound": 1},
    )
    trainer.train()
    assert not biases(trainer.model).any()


def test_several_ranks_add_up_their_counts() -> None:
    model = tiny.model(text={"router_bias_update_rate": RATE, "sparse_layers": [0]}).train()
    model(input_ids=torch.tensor([[5, 6, 7]]))
    gate = model.model.language_model.layers[0].mlp.gate
    other = torch.tensor([[100.0, 100.0, 0.0, 0.0]])
    update_choice_biases(model, lambda load: load + other)
    assert gate.load_C is None
    torch.testing.assert_close(gate.choice_bias_C, RATE * torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    # A rank without a batch joins in all the same.
    calls: list[torch.Tensor] = []
    update_choice_biases(model, lambda load: calls.append(load) or load)
    assert F.normalize(calls[0]).sum() == 0
