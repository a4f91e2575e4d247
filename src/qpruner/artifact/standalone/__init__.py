"""Python files that go beside an artifact's weights, so that it loads where qpruner is not installed.

They are copied as they are, never imported here: a class in them has the model type that qpruner registers.
transformers runs them with trust_remote_code; vLLM builds layers of their own widths with them, in its transformers
backend, and reads weights itself.
"""

import json
import shutil
from pathlib import Path

FILES = tuple(sorted(Path(__file__).parent.glob("*_qpruner.py")))
# In an order in which vLLM looks for the first model.
AUTO_MAP = {
    "AutoConfig": "configuration_qpruner.QPrunerConfig",
    "AutoModel": "modeling_qpruner.QPrunerModel",
    "AutoModelForCausalLM": "modeling_qpruner.QPrunerForCausalLM",
}
# Of a class that no other program has: the original's would be built with one width for all layers.
ARCHITECTURE = "QPrunerForCausalLM"


def put_beside(folder: Path, told: dict) -> None:
    """Copy the files into an artifact's folder, and write into its config.json what they have to be told.

    The original's own fields, such as its context length, are stated there too, for those who ask no class of ours.
    """
    content = json.loads((folder / "config.json").read_text())
    unstated = {k: v for k, v in content["base_config"].items() if k not in ("transformers_version", "auto_map")}
    content = unstated | content | told | {"auto_map": AUTO_MAP, "architectures": [ARCHITECTURE]}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for file in FILES:
        shutil.copyfile(file, folder / file.name)
