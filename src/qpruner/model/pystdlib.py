"""Python's standard library as text: what the bundled model learned from, and what it never saw.

Every Python carries these sources, so a corpus for the bundled model needs no download. Three disjoint sets of modules:

    evaluation    the held-out modules, named in the model's folder: never trained on, in any version of Python
    search        about one in eight of the others, by a hash of the module's path: the same on every machine
    calibration   the rest

`test` packages are left out of all three, since distributions often leave them out of Python.
"""

import hashlib
import json
import os
import sysconfig
from pathlib import Path

NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "idlelib", "turtledemo"}
HELDOUT_FILE = "heldout_modules.json"
BUNDLED_NAME = "pystdlib-5M"


def bundled_folder() -> Path:
    """The folder of the model that ships inside this package."""
    return Path(__file__).resolve().parents[1] / "bundled" / BUNDLED_NAME


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def heldout_modules(model_folder: Path) -> frozenset[str]:
    """Paths, relative to the library's root, of the modules that the bundled model was never trained on."""
    return frozenset(json.loads((model_folder / HELDOUT_FILE).read_text()))


def modules(root: Path, *, excluded: set[str] = NOT_SOURCE) -> list[str]:
    """Relative paths of the library's Python sources, sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in excluded]  # not entered: what is installed there is far more
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def is_held_out(module: str, heldout: frozenset[str]) -> bool:
    """Whether a module is held out, by its path or as part of a package that was one file in an older Python."""
    return module in heldout or ("/" in module and module.split("/")[0] + ".py" in heldout)


def is_test_of(module: str, heldout: frozenset[str]) -> bool:
    """Whether `module` belongs to test/test_NAME, a file or a folder, for a top-level held-out NAME."""
    parts = module.removesuffix(".py").split("/")
    return len(parts) > 1 and parts[0] == "test" and parts[1].removeprefix("test_") + ".py" in heldout


def trainable(root: Path, heldout: frozenset[str]) -> list[str]:
    """Modules that a model may be trained on: neither held out nor the tests of what is."""
    candidates = modules(root, excluded={"site-packages", "dist-packages", "__pycache__", "encodings"})
    return [m for m in candidates if not is_held_out(m, heldout) and not is_test_of(m, heldout)]


def corpus_modules(root: Path, heldout: frozenset[str], corpus: str) -> list[str]:
    """The modules of one corpus, in a fixed order: by name for evaluation, by hash for the other two."""
    names = [m for m in modules(root) if not m.startswith("test/") and "/test/" not in m and "/tests/" not in m]
    if corpus == "evaluation":
        return [m for m in names if is_held_out(m, heldout)]
    digest = {m: hashlib.sha256(m.encode()).digest() for m in names if not is_held_out(m, heldout)}
    chosen = [m for m, d in digest.items() if (d[-1] % 8 == 0) == (corpus == "search")]
    return sorted(chosen, key=digest.__getitem__)


def read(root: Path, module: str) -> str:
    return (root / module).read_text(encoding="utf-8", errors="replace")
