"""Full size, only with --run-large."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "streaming_7b.py"


@pytest.mark.large
@pytest.mark.timeout(5400)
def test_a_7b_is_scored_and_pruned_in_4_gib(tmp_path):
    found = subprocess.run(
        [sys.executable, str(BENCHMARK), "--folder", str(tmp_path), "--json"], stdout=subprocess.PIPE, check=True
    )
    measured = json.loads(found.stdout.splitlines()[-1])
    assert measured["peak"] <= 4 * 2**30
    assert 0.75 <= measured["promised"] / measured["peak"] <= 1.25
    assert not list(tmp_path.iterdir()), "it cleans up after itself"
