"""Python files that go beside an artifact's weights, so that transformers loads it where qpruner is not installed.

They are copied as they are, never imported here: a class in them has the model type that qpruner registers.
"""

from pathlib import Path

FILES = tuple(sorted(Path(__file__).parent.glob("*_qpruner.py")))
AUTO_MAP = {
    "AutoConfig": "configuration_qpruner.QPrunerConfig",
    "AutoModelForCausalLM": "modeling_qpruner.QPrunerForCausalLM",
}
