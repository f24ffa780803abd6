"""The three connectors: shapes, formulas, initialisation, loading, precision and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from unimoe.modeling_unimoe.configuration_unimoe import UniMoeConnectorConfig
from unimoe.modeling_unimoe.connectors_unimoe import (
    MlpConnector,
    QFormerConnector,
    QueryDecoderConnector,
    build_connector,
    init_connector_weights,
)
from unimoe.modeling_unimoe.errors_unimoe import ConfigurationError
from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeRMSNorm

INPUT, OUTPUT, QUERIES, POSITIONS = 16, 24, 5, 12
WHISPER = {
    "vocab_size": 51_865,
    "d_model": INPUT,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "encoder_ffn_dim": 32,
    "max_target_positions": 8,
    "init_std": 0.3,
}
QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
KINDS = ["mlp", "query_decoder", "qformer"]


def connector_config(kind: str, attention: str | None = None, **overrides: Any) -> UniMoeConnectorConfig:
    fields: dict[str, Any] = {"type": kind, "input_size": INPUT, "output_size": OUTPUT, "num_tokens": QUERIES}
    config = UniMoeConnectorConfig(**{**fields, "decoder_config": WHISPER, "qformer_config": QFORMER, **overrides})
    if attention is not None:
        config._attn_implementation = attention
    return config


def connector(kind: str, seed: int = 0, **options: Any) -> Any:
    """A connector in eval mode whose queries and biases are not zero."""
    torch.manual_seed(seed)
    built = build_connector(connector_config(kind, **options)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def states(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, POSITIONS, INPUT, generator=torch.Generator().manual_seed(seed))


class HostConfig(PreTrainedConfig):
    model_type = "connector_host"


class Host(PreTrainedModel):
    """The smallest model that owns connectors, to see them initialised, saved and loaded."""

    config_class = HostConfig
    base_model_prefix = "host"

    def __init__(self, config: HostConfig, connectors: list[UniMoeConnectorConfig] | None = None) -> None:
        super().__init__(config)
        built = connectors or [connector_config(kind, output_norm=True) for kind in KINDS]
        self.connectors = nn.ModuleList(build_connector(each) for each in built)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_connector_weights(module, 0.02)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_gives_num_tokens_embeddings(kind: str, norm: bool) -> None:
    output = connector(kind, output_norm=norm)(states(3))
    assert output.shape == (3, QUERIES, OUTPUT)
    assert output.isfinite().all()


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_mlp_is_linear_layers_with_exact_gelu_between(depth: int) -> None:
    mlp = connector("mlp", depth=depth, num_tokens=None)
    expected = states()
    for index, layer in enumerate(mlp.layers):
        expected = functional.gelu(expected, approximate="none") if index else expected
        expected = expected @ layer.weight.t() + layer.bias
    assert len(mlp.layers) == depth
    torch.testing.assert_close(mlp(states()), expected)


@torch.no_grad()
def test_mlp_pools_positions_before_projecting() -> None:
    mlp = connector("mlp", num_tokens=4)
    pooled = states().unflatten(1, (4, POSITIONS // 4)).mean(dim=2)
    unpooled = connector("mlp", num_tokens=None)
    torch.testing.assert_close(mlp(states()), unpooled(pooled))


@pytest.mark.parametrize("kind", ["query_decoder", "qformer"])
@torch.no_grad()
def test_attention_implementations_agree(kind: str) -> None:
    outputs = {}
    for attention in ("eager", "sdpa"):
        built = connector(kind, attention=attention)
        inner = built.decoder if kind == "query_decoder" else built.qformer
        assert inner.config._attn_implementation == attention
        outputs[attention] = built(states())
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_query_decoder_is_causal_over_queries_and_sees_all_states() -> None:
    decoder = connector("query_decoder")
    before = decoder(states())
    decoder.query_tokens[:, -1] += 1.0
    changed = (decoder(states()) - before).abs().amax(dim=(0, 2))
    assert changed[:-1].max() == 0
    assert changed[-1] > 0
    other = states()
    other[:, -1] += 1.0
    assert ((decoder(other) - decoder(states())).abs().amax(dim=(0, 2)) > 0).all()


@torch.no_grad()
def test_queries_of_the_qformer_see_each_other_and_all_states() -> None:
    qformer = connector("qformer")
    before = qformer(states())
    other = states()
    other[:, -1] += 1.0
    assert ((qformer(other) - before).abs().amax(dim=(0, 2)) > 0).all()
    qformer.query_tokens[:, -1] += 1.0
    assert ((qformer(states()) - before).abs().amax(dim=(0, 2)) > 0).all()


@torch.no_grad()
def test_query_decoder_positions_tell_equal_queries_apart() -> None:
    decoder = connector("query_decoder")
    decoder.query_tokens.zero_()
    output = decoder(states())
    assert (output[:, 0] - output[:, 1]).abs().max() > 1e-3


def test_query_decoder_carries_no_vocabulary() -> None:
    decoder = connector("query_decoder")
    assert not [name for name in decoder.state_dict() if "embed_tokens" in name]
    assert sum(parameter.numel() for parameter in decoder.parameters()) < 51_865


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_a_batch_are_independent(kind: str) -> None:
    built = connector(kind)
    together = built(states(3))
    for row in range(3):
        torch.testing.assert_close(built(states(3)[row : row + 1])[0], together[row], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_output_norm_sets_the_scale_of_the_embeddings() -> None:
    built = connector("mlp", output_norm=True)
    built.output_norm.weight.fill_(0.02)
    torch.testing.assert_close(built(1000 * states()).pow(2).mean(dim=-1).sqrt(), torch.full((2, QUERIES), 0.02))
    assert isinstance(connector("mlp").output_norm, nn.Identity)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_the_states(kind: str, norm: bool) -> None:
    built = connector(kind, output_norm=norm).train()
    inputs = states().requires_grad_()
    built(inputs).pow(3).sum().backward()
    assert inputs.grad.abs().sum() > 0
    # A bias of the keys shifts all logits of a row, which softmax ignores; positions beyond the queries are unused.
    without = [
        name
        for name, parameter in built.named_parameters()
        if not name.endswith("key.bias") and (parameter.grad is None or parameter.grad.abs().sum() == 0)
    ]
    assert without == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_takes_float32_states(kind: str, dtype: torch.dtype) -> None:
    expected = connector(kind, output_norm=True)(states())
    actual = connector(kind, output_norm=True).to(dtype)(states())
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_eval_mode_is_deterministic(kind: str) -> None:
    built = connector(kind)
    assert torch.equal(built(states()), built(states()))


def test_fresh_weights_are_initialised_by_the_model_that_owns_them() -> None:
    torch.manual_seed(0)
    mlp, decoder, qformer = Host(HostConfig()).connectors
    assert (mlp.layers[0].bias == 0).all()
    assert 0.01 < mlp.layers[0].weight.std() < 0.03
    assert (decoder.query_tokens == 0).all()
    assert 0.01 < qformer.query_tokens.std() < 0.03
    assert all((each.output_norm.weight == 1).all() for each in (mlp, decoder, qformer))


def test_a_fresh_qformer_has_gradients_of_ordinary_size() -> None:
    """Zero queries would meet the LayerNorm's eps of 1e-12 and multiply every gradient by about a million."""
    torch.manual_seed(0)
    qformer = Host(HostConfig()).connectors[KINDS.index("qformer")].eval()
    qformer(states()).pow(3).sum().backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in qformer.named_parameters()}
    assert norms["query_tokens"] < 1e3 * norms["projector.weight"]


@torch.no_grad()
def test_saved_connectors_load_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = Host(HostConfig()).eval()
    host.connectors[1].query_tokens.normal_()
    host.save_pretrained(tmp_path)
    # from_pretrained builds on the meta device and fills the weights in.
    loaded, report = Host.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for one, other in zip(host.connectors, loaded.eval().connectors, strict=True):
        assert torch.equal(one(states()), other(states()))


@torch.no_grad()
def test_connectors_missing_from_a_checkpoint_get_usable_weights(tmp_path: Path) -> None:
    class Empty(Host):
        def __init__(self, config: HostConfig) -> None:
            PreTrainedModel.__init__(self, config)
            self.unrelated = nn.Linear(1, 1)
            self.post_init()

    Empty(HostConfig()).save_pretrained(tmp_path)
    for built in Host.from_pretrained(tmp_path).eval().connectors:
        assert not any(parameter.is_meta for parameter in built.parameters())
        assert built(states()).isfinite().all()
        assert (built.output_norm.weight == 1).all()


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("query_decoder", {"decoder_config": None}, "no decoder_config"),
        ("query_decoder", {"decoder_config": {**WHISPER, "d_model": 32}}, "d_model is 32"),
        ("query_decoder", {"num_tokens": 9}, "num_tokens is 9 but the decoder has 8 positions"),
        ("query_decoder", {"decoder_config": {**WHISPER, "decoder_layers": 10**9}}, "decoder_layers is 1000000000"),
        ("qformer", {"qformer_config": {**QFORMER, "encoder_hidden_size": 8}}, "encoder_hidden_size is 8"),
        ("qformer", {"qformer_config": {**QFORMER, "num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
    ],
)
def test_impossible_connectors_are_refused(kind: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_connector(connector_config(kind, **overrides))


def test_unknown_types_are_refused() -> None:
    config = connector_config("mlp")
    object.__setattr__(config, "type", "perceiver")
    with pytest.raises(ConfigurationError, match=r"'perceiver'.*'mlp', 'qformer', 'query_decoder'"):
        build_connector(config)


def test_types_map_to_classes() -> None:
    classes = [type(build_connector(connector_config(kind))) for kind in KINDS]
    assert classes == [MlpConnector, QueryDecoderConnector, QFormerConnector]


@torch.no_grad()
def test_rmsnorm_computes_in_float32() -> None:
    norm = UniMoeRMSNorm(OUTPUT, 1e-6).to(torch.float16)
    large = torch.full((1, OUTPUT), 30_000.0, dtype=torch.float16)
    torch.testing.assert_close(norm(large), torch.ones(1, OUTPUT, dtype=torch.float16))
