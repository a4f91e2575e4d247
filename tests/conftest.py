import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker():
    """Two test workers on two cores: more threads than cores cost several times the work itself."""
    torch.set_num_threads(1)


@pytest.fixture
def rand():
    """Seeded float64 normal tensors: `rand(3, 4)`."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
