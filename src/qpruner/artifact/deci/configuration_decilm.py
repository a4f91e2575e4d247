"""Configuration of a Llama whose layers have widths of their own, in the words of DeciLM and Nemotron-NAS."""

from dataclasses import asdict, dataclass

from transformers import LlamaConfig


@dataclass
class AttentionConfig:
    """n_heads_in_group: query heads that share a key/value head."""

    n_heads_in_group: int = 1
    no_op: bool = False


@dataclass
class FFNConfig:
    intermediate_size: int = 0
    no_op: bool = False


@dataclass
class BlockConfig:
    attention: AttentionConfig
    ffn: FFNConfig

    @classmethod
    def of(cls, content: "dict | BlockConfig") -> "BlockConfig":
        if isinstance(content, cls):
            return content
        return cls(AttentionConfig(**content["attention"]), FFNConfig(**content["ffn"]))


class DeciLMConfig(LlamaConfig):
    """block_configs: what every layer has. qkv_bias: of q, k and v alone; attention_bias is that of o too."""

    model_type = "nemotron-nas"

    def __post_init__(self, **kwargs):
        self.block_configs = [BlockConfig.of(block) for block in kwargs.pop("block_configs", None) or []]
        self.qkv_bias = kwargs.pop("qkv_bias", self.attention_bias)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Heads need not divide the hidden size: some may have gone."""

    def to_dict(self):
        content = super().to_dict()
        blocks = content.get("block_configs", ())
        content["block_configs"] = [asdict(b) if isinstance(b, BlockConfig) else b for b in blocks]
        return content
