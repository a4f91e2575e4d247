import subprocess
import sys

import pytest


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_nothing_heavy():
    found = python("import qpruner, sys; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import qpruner",
        "transformers.AutoModelForCausalLM; import qpruner",
        "import qpruner.artifact.config",
        "import qpruner.artifact.loader",
        "import qpruner.model.load",
    ],
)
def test_the_type_is_known_whatever_is_imported_first(order):
    known = (
        "config = transformers.AutoConfig.for_model('qpruner');"
        "print(config.model_type, transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__)"
    )
    found = python(f"import transformers; {order}; {known}")
    assert found.stdout.strip() == "qpruner QPrunerForCausalLM", found.stderr
