"""placeholder"""
from dataclasses import dataclass
@dataclass(frozen=True)
class Verdict:
    rule: str
    holds: bool
    sentence: str
def vllm_verdict(config): return []
