import atexit
import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# transformers copies code that comes with a model there before it runs it, and reads this when it is imported
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="qpruner-tests-")

import pytest
import torch

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--run-large", action="store_true", help="also tests of full-size models: many minutes, 30 GB of disk"
    )
    parser.addoption("--run-targets", action="store_true", help="also all cells of the target table: minutes")
    parser.addoption("--write-targets", metavar="PATH", help="with --run-targets: write the table as a page")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-large"):
        for item in items:
            if "large" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="full size; give --run-large"))


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker():
    """Two test workers on two cores: more threads than cores cost several times the work itself."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_searched_for_cycles():
    """What is loaded by now, torch and transformers above all, stays: each full collection took 0.3 s to find that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def short_text(tmp_path_factory) -> Path:
    """A text that is quickly read and cut, where a test does not ask how good anything is."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("\n".join(f"line {i} says that {i * 37 % 101} follows {i % 13}" for i in range(2000)))
    return path


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory) -> Path:
    """A folder with a random model that is large enough to prune and to quantize."""
    from tiny_folder import save, tiny_model

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    model = tiny_model("llama", **sizes, **heads).to(torch.bfloat16)
    return save(model, tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


@pytest.fixture
def rand():
    """Seeded float64 normal tensors: `rand(3, 4)`."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def each_once(tmp_path_factory):
    """Turns `make(folder, key)` into something that makes each key once; nobody writes into what it gives."""

    def of(make):
        return functools.cache(lambda key: make(tmp_path_factory.mktemp("made") / "out", key))

    return of
