"""The part of a recipe that says which mixers (MoAI) a model gets."""

from dataclasses import asdict, dataclass

from .recipe_values import require, require_range


@dataclass
class MixersConfig:
    """Mixers of a model that has none, drawn before the first stage that trains some; see `UniMoeMixerConfig`.

    Args:
        layers: 0-based decoder layers that get one; MoAI: every eighth.
        compressor_ffn_size: None means the decoder's hidden size.
    """

    layers: list[int]
    rank: int = 64
    num_heads: int = 4
    num_latents: int = 64
    compressor_depth: int = 4
    compressor_heads: int = 4
    compressor_head_dim: int = 64
    compressor_ffn_size: int | None = None

    def check(self, where: str) -> None:
        ascending = bool(self.layers) and sorted(set(self.layers)) == self.layers
        require(ascending, f"{where}.layers", self.layers, "different layers in ascending order")
        for name, value in asdict(self).items():
            if name != "layers" and value is not None:
                require_range(f"{where}.{name}", value, 1, 1 << 20)


__all__ = ["MixersConfig"]
