"""For tests, ours and those of people who bring an architecture: tiny random models, and the proof one is served."""

from qpruner.testing.proof import Row, check_architecture, check_loading, random_kept, zeroed
from qpruner.testing.tiny import tiny_config, tiny_model

__all__ = ["Row", "check_architecture", "check_loading", "random_kept", "tiny_config", "tiny_model", "zeroed"]
