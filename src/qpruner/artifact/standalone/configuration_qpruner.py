"""The configuration of a compressed model: that of the original, and what its modules count since units went."""

from transformers import CONFIG_MAPPING, PreTrainedConfig


class QPrunerConfig(PreTrainedConfig):
    """base_config: the original's. narrowed: module -> attributes that are not the original's. shapes: of tensors that
    are not as large as the original's. embeddings: of those in codes, what rows are multiplied by, and the heads that
    multiply with the same codes. For those who read weights themselves, coded: whether anything lies in codes
    of qpruner's own; own_linears: whether the original's linears are of a class of its own."""

    model_type = "qpruner"

    def __init__(
        self, base_config=None, narrowed=None, shapes=None, embeddings=None, coded=True, own_linears=False, **kwargs
    ):
        self.base_config = base_config or {}
        self.narrowed, self.shapes, self.embeddings = narrowed or {}, shapes or {}, embeddings or {}
        self.coded, self.own_linears = coded, own_linears
        super().__init__(**kwargs)

    def original(self) -> PreTrainedConfig:
        fields = {k: v for k, v in self.base_config.items() if k not in ("transformers_version", "architectures")}
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        config.architectures = self.base_config.get("architectures")
        return config
