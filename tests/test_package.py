import subprocess
import sys


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_imports_nothing_heavy():
    found = python("import qpruner, sys; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr


def test_the_type_is_known_whichever_is_imported_first():
    for order in ("import qpruner, transformers", "import transformers; transformers.AutoConfig; import qpruner"):
        found = python(f"{order}; print(transformers.AutoConfig.for_model('qpruner').model_type)")
        assert found.stdout.strip() == "qpruner", found.stderr
