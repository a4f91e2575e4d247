import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_nothing_heavy():
    found = python("import qpruner, sys; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


ORDERS = (
    "import qpruner",
    "transformers.AutoModelForCausalLM; import qpruner",
    "import qpruner.artifact.config",
    "import qpruner.artifact.loader",
    "import qpruner.model.load",
)

EACH = """
import gc, os, sys
import torch._dynamo, torch.distributed.tensor  # half of what transformers takes to import, and nothing of transformers
assert not any(name.partition(".")[0] in ("transformers", "qpruner") for name in sys.modules)
gc.freeze()
for order in sys.argv[1:]:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    import transformers
    exec(order)
    config = transformers.AutoConfig.for_model("qpruner")
    print(config.model_type, transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__)
    sys.exit()
"""


def test_the_type_is_known_whatever_is_imported_first():
    """Each order in a process of its own."""
    found = subprocess.run([sys.executable, "-c", EACH, *ORDERS], capture_output=True, text=True, check=False)
    assert found.stdout.splitlines() == ["qpruner QPrunerForCausalLM"] * len(ORDERS), found.stderr
