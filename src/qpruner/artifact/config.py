"""The configuration of an artifact: a model type of our own around the original one.

A stock model type would let a transformers that cannot read the packed tensors load the folder with random weights and
no more than a warning; a type that it does not know is refused with an error, which is the safe failure.
"""

from pathlib import Path

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

MODEL_TYPE = "qpruner"


class QPrunerConfig(PreTrainedConfig):
    """base_config: the original model's configuration, as its `to_dict()`.

    Beside it stand the common dimensions of the original, and in transformers' `per_layer_config` what differs
    from them in each layer, for tools that read those.
    """

    model_type = MODEL_TYPE

    def __init__(self, base_config: dict | None = None, **kwargs):
        self.base_config = base_config or {}
        super().__init__(**kwargs)

    def original(self, folder: Path | None = None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
        """The configuration of the class that the artifact is an instance of.

        Args:
            folder: of the artifact, where the code of an original that brought its own lies; by default where this
                was read from.
            trust_remote_code: whether that code may run.
        Raises:
            ModelError: it would have to, and may not.
        """
        fields = {k: v for k, v in self.base_config.items() if k not in ("transformers_version", "architectures")}
        if "auto_map" in fields:
            from qpruner.model import remote  # it needs transformers, whose import may be under way here

            folder = folder or Path(self.name_or_path)
            folder = folder.parent if folder.is_file() else folder
            if not trust_remote_code:
                raise remote.refusal(folder.name, fields["model_type"])
            original = remote.read_config(fields, folder)
        else:
            original = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        original.architectures = self.base_config.get("architectures")
        return original


# Here and not in a function: importing this module and importing transformers' auto classes each bring in the other;
# whichever comes first, the type is known at the end.
AutoConfig.register(MODEL_TYPE, QPrunerConfig, exist_ok=True)
