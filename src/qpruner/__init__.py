"""qpruner: give it a decoder LLM and a size in bytes; it returns the best model that fits.

Importing this package makes `transformers.AutoModelForCausalLM.from_pretrained` load artifacts. It imports neither
torch nor transformers: the registration waits until transformers' auto classes are themselves imported.
"""

from importlib import import_module

from wrapt import when_imported

__version__ = "0.1.0"

_API = ("compress", "evaluate", "export", "inspect", "recover", "search", "study")


@when_imported("transformers.models.auto.configuration_auto")
def _register_config(module) -> None:
    import_module("qpruner.artifact.config")


@when_imported("transformers.models.auto.modeling_auto")
def _register_model(module) -> None:
    import_module("qpruner.artifact.loader")


def __getattr__(name: str):
    if name in _API:
        return getattr(import_module("qpruner.api"), name)
    raise AttributeError(f"module 'qpruner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_API]
