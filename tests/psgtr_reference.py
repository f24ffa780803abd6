"""PSGTR in plain torch functions, by the names and the layout of OpenPSG's checkpoint: what the port must reproduce."""

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

State = dict[str, torch.Tensor]

WIDTH, HEADS, QUERIES, FEED_FORWARD = 128, 8, 5, 24
STAGES, DEPTHS = (16, 24, 32, 48), (2, 1, 1, 1)
CLASSES, PREDICATES = 133, 56


def original_state(seed: int = 0) -> State:
    """Random tensors of a tiny PSGTR: 1 encoder layer, 2 decoder layers."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def add(name: str, *shape: int, bias: bool = True, scale: float | None = None) -> None:
        spread = scale or 1 / math.sqrt(max(1, math.prod(shape[1:])))
        state[f"{name}.weight"] = torch.randn(*shape, generator=generator) * spread
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def add_norm(name: str, size: int, running: bool = False) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)
        if running:
            state[f"{name}.running_mean"] = 0.2 * torch.randn(size, generator=generator)
            state[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=generator)
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    add("backbone.conv1", 8, 3, 7, 7, bias=False)
    add_norm("backbone.bn1", 8, True)
    before = 8
    for stage, (size, depth) in enumerate(zip(STAGES, DEPTHS, strict=True), 1):
        for block in range(depth):
            prefix, inner = f"backbone.layer{stage}.{block}", size // 4
            for number, shape in enumerate([(inner, before, 1, 1), (inner, inner, 3, 3), (size, inner, 1, 1)], 1):
                add(f"{prefix}.conv{number}", *shape, bias=False)
                add_norm(f"{prefix}.bn{number}", shape[0], True)
            if block == 0:
                add(f"{prefix}.downsample.0", size, before, 1, 1, bias=False)
                add_norm(f"{prefix}.downsample.1", size, True)
            before = size
    add("bbox_head.input_proj", WIDTH, STAGES[-1], 1, 1)
    add("bbox_head.query_embed", QUERIES, WIDTH, bias=False, scale=1)
    for part, layers, attentions in (("encoder", 1, 1), ("decoder", 2, 2)):
        for layer in range(layers):
            prefix = f"bbox_head.transformer.{part}.layers.{layer}"
            for i in range(attentions):
                state[f"{prefix}.attentions.{i}.attn.in_proj_weight"] = (
                    torch.randn(3 * WIDTH, WIDTH, generator=generator) / WIDTH**0.5
                )
                state[f"{prefix}.attentions.{i}.attn.in_proj_bias"] = torch.randn(3 * WIDTH, generator=generator) * 0.1
                add(f"{prefix}.attentions.{i}.attn.out_proj", WIDTH, WIDTH)
            add(f"{prefix}.ffns.0.layers.0.0", FEED_FORWARD, WIDTH)
            add(f"{prefix}.ffns.0.layers.1", WIDTH, FEED_FORWARD)
            for i in range(attentions + 1):
                add_norm(f"{prefix}.norms.{i}", WIDTH)
    add_norm("bbox_head.transformer.decoder.post_norm", WIDTH)
    _add_heads(add, add_norm)
    return state


def _add_heads(add: Callable[..., None], add_norm: Callable[..., None]) -> None:
    for part in ("sub", "obj"):
        add(f"bbox_head.{part}_cls_embed", CLASSES + 1, WIDTH)
        for i, size in enumerate((WIDTH, WIDTH, 4)):
            add(f"bbox_head.{part}_box_embed.layers.{i}", size, WIDTH)
        for name in ("q_linear", "k_linear"):
            add(f"bbox_head.{part}_bbox_attention.{name}", WIDTH, WIDTH)
        sizes = [WIDTH + HEADS, WIDTH + HEADS, *(WIDTH // n for n in (2, 4, 8, 16))]
        for i in range(1, 6):
            add(f"bbox_head.{part}_mask_head.lay{i}", sizes[i], sizes[i - 1], 3, 3)
            add_norm(f"bbox_head.{part}_mask_head.gn{i}", sizes[i])
        for i, channels in enumerate(STAGES[2::-1], 1):
            add(f"bbox_head.{part}_mask_head.adapter{i}", sizes[i + 1], channels, 1, 1)
        add(f"bbox_head.{part}_mask_head.out_lay", 1, sizes[5], 3, 3)
    add("bbox_head.rel_cls_embed", PREDICATES + 1, WIDTH)


def original_heads(state: State, pixels: torch.Tensor, padding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Heads of images [B, 3, H, W]; `padding` [B, H, W] is True beside the image."""
    maps = _resnet(state, pixels)
    head = _below(state, "bbox_head.")
    projected = F.conv2d(maps[-1], head["input_proj.weight"], head["input_proj.bias"])
    hidden = F.interpolate(padding[:, None].float(), size=projected.shape[-2:])[:, 0].bool()
    memory, queries = _transformer(head, projected, hidden)
    found = {"rel_cls": _linear(head, "rel_cls_embed", queries)}
    for part in ("sub", "obj"):
        found[f"{part}_cls"] = _linear(head, f"{part}_cls_embed", queries)
        box = _linear(head, f"{part}_box_embed.layers.0", queries).relu()
        box = _linear(head, f"{part}_box_embed.layers.1", box).relu()
        found[f"{part}_box"] = _linear(head, f"{part}_box_embed.layers.2", box).sigmoid()
        attention = _attention_map(head, f"{part}_bbox_attention", queries, memory, hidden)
        found[f"{part}_mask"] = _masks(_below(head, f"{part}_mask_head."), projected, attention, maps)
    return found


def _resnet(state: State, pixels: torch.Tensor) -> list[torch.Tensor]:
    x = _norm2d(state, "backbone.bn1", F.conv2d(pixels, state["backbone.conv1.weight"], stride=2, padding=3)).relu()
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for stage, depth in enumerate(DEPTHS, 1):
        for block in range(depth):
            prefix, stride = f"backbone.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = _norm2d(state, f"{prefix}.bn1", F.conv2d(x, state[f"{prefix}.conv1.weight"])).relu()
            y = F.conv2d(y, state[f"{prefix}.conv2.weight"], stride=stride, padding=1)
            y = _norm2d(state, f"{prefix}.bn2", y).relu()
            y = _norm2d(state, f"{prefix}.bn3", F.conv2d(y, state[f"{prefix}.conv3.weight"]))
            if f"{prefix}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{prefix}.downsample.0.weight"], stride=stride)
                x = _norm2d(state, f"{prefix}.downsample.1", x)
            x = (x + y).relu()
        maps.append(x)
    return maps


def _transformer(head: State, projected: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    position = _sine(hidden).flatten(2).permute(2, 0, 1)
    x, mask = projected.flatten(2).permute(2, 0, 1), hidden.flatten(1)
    prefix = "transformer.encoder.layers.0"
    x = _norm(head, f"{prefix}.norms.0", x + _attend(head, f"{prefix}.attentions.0", x, x, position, position, mask))
    memory = _norm(head, f"{prefix}.norms.1", x + _feed(head, prefix, x))
    slots = head["query_embed.weight"][:, None].expand(-1, len(projected), -1)
    q = torch.zeros_like(slots)
    for layer in range(2):
        prefix = f"transformer.decoder.layers.{layer}"
        q = _norm(head, f"{prefix}.norms.0", q + _attend(head, f"{prefix}.attentions.0", q, q, slots, slots, None))
        seen = _attend(head, f"{prefix}.attentions.1", q, memory, slots, position, mask)
        q = _norm(head, f"{prefix}.norms.1", q + seen)
        q = _norm(head, f"{prefix}.norms.2", q + _feed(head, prefix, q))
    q = _norm(head, "transformer.decoder.post_norm", q)
    return memory.permute(1, 2, 0).view_as(projected), q.transpose(0, 1)


def _attend(
    head: State,
    prefix: str,
    query: torch.Tensor,
    key: torch.Tensor,
    query_position: torch.Tensor,
    key_position: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    own = _below(head, f"{prefix}.attn.")
    output, _ = F.multi_head_attention_forward(
        query + query_position,
        key + key_position,
        key,
        WIDTH,
        HEADS,
        own["in_proj_weight"],
        own["in_proj_bias"],
        None,
        None,
        False,
        0.0,
        own["out_proj.weight"],
        own["out_proj.bias"],
        training=False,
        key_padding_mask=mask,
    )
    return output


def _sine(hidden: torch.Tensor) -> torch.Tensor:
    rows, columns = (~hidden).float().cumsum(1), (~hidden).float().cumsum(2)
    rows = rows / (rows[:, -1:] + 1e-6) * 2 * math.pi
    columns = columns / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
    half = WIDTH // 2
    frequency = 10000 ** (2 * (torch.arange(half) // 2) / half)
    parts = []
    for angle in (rows[..., None] / frequency, columns[..., None] / frequency):
        parts.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3))
    return torch.cat(parts, dim=-1).permute(0, 3, 1, 2)


def _attention_map(
    head: State, name: str, queries: torch.Tensor, memory: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    q = _linear(head, f"{name}.q_linear", queries).unflatten(-1, (HEADS, -1))
    weight, bias = head[f"{name}.k_linear.weight"], head[f"{name}.k_linear.bias"]
    k = F.conv2d(memory, weight[..., None, None], bias).unflatten(1, (HEADS, -1))
    weights = torch.einsum("bqnc,bnchw->bqnhw", q * (WIDTH / HEADS) ** -0.5, k)
    weights = weights.masked_fill(hidden[:, None, None], float("-inf"))
    return weights.flatten(2).softmax(-1).view_as(weights)


def _masks(own: State, projected: torch.Tensor, attention: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    batch, queries = attention.shape[:2]

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, queries, -1, -1, -1).flatten(0, 1)

    x = torch.cat([repeated(projected), attention.flatten(0, 1)], 1)
    for i in range(1, 6):
        x = F.conv2d(x, own[f"lay{i}.weight"], own[f"lay{i}.bias"], padding=1)
        x = F.group_norm(x, 8, own[f"gn{i}.weight"], own[f"gn{i}.bias"]).relu()
        if 2 <= i <= 4:
            finer = F.conv2d(maps[4 - i], own[f"adapter{i - 1}.weight"], own[f"adapter{i - 1}.bias"])
            x = repeated(finer) + F.interpolate(x, size=finer.shape[-2:], mode="nearest")
    x = F.conv2d(x, own["out_lay.weight"], own["out_lay.bias"], padding=1)
    return x.view(batch, queries, *x.shape[-2:])


def _feed(head: State, prefix: str, x: torch.Tensor) -> torch.Tensor:
    return _linear(head, f"{prefix}.ffns.0.layers.1", _linear(head, f"{prefix}.ffns.0.layers.0.0", x).relu())


def _linear(head: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, head[f"{name}.weight"], head[f"{name}.bias"])


def _norm(head: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (WIDTH,), head[f"{name}.weight"], head[f"{name}.bias"])


def _norm2d(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    own = _below(state, f"{name}.")
    return F.batch_norm(x, own["running_mean"], own["running_var"], own["weight"], own["bias"])


def _below(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
