"""qpruner: give it a decoder LLM and a size in bytes; it returns the best model that fits."""

__version__ = "0.1.0"
