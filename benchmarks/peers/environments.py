"""One virtual environment for each peer, outside the repository: what is installed, and how.

All get the same torch. Where a peer's own requirements leave no room for it, the peer is installed without them, and
they are named here instead.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
FIRST = (TORCH, "numpy", "safetensors", "setuptools", "wheel", "psutil")


@dataclass(frozen=True)
class Peer:
    """adapter: file beside this one. packages: with their requirements; bare: without, after everything else.

    bits: what it has grids for. variants: the first is its best general setting, or its default.
    chooses: it chooses widths for a target in bytes, and has no cells of one width.
    within: the peer whose environment it shares.
    """

    adapter: str
    packages: tuple[str, ...]
    variants: tuple[str, ...]
    bits: tuple[int, ...] = (4, 3, 2)
    bare: tuple[str, ...] = ()
    chooses: bool = False
    within: str | None = None


PEERS = {
    "qpruner": Peer("qpruner_.py", (), ("fast", "full", "nearest", "layers", "binary")),
    "hqq": Peer("hqq_.py", ("hqq==0.2.8", "transformers", "accelerate"), ("rtn", "axis1", "axis0")),
    "torchao": Peer(
        "torchao_.py", ("torchao==0.18.*", "transformers", "accelerate"), ("intx-asym", "intx", "intx-hqq")
    ),
    "bitsandbytes": Peer(
        "bitsandbytes_.py", ("bitsandbytes==0.50.*", "transformers", "accelerate"), ("nf4", "nf4-double"), bits=(4,)
    ),
    "gptqmodel": Peer(
        "gptqmodel_.py",
        ("accelerate>=1.15", "transformers>=5.20.2", "threadpoolctl", "device-smi", "protobuf", "pillow", "requests",
         "pypcre", "tokenicer", "logbar", "ninja", "datasets", "pyarrow", "dill", "torchao==0.18.*", "defuser"),
        ("gptq", "symmetric", "mse", "gptaq", "gptaq-mse", "desc_act", "desc_act-mse", "foem"),
        bare=("gptqmodel==7.7.0",),
    ),
    "llmcompressor": Peer(
        "llmcompressor_.py", ("llmcompressor==0.14.*",), ("gptq", "mse", "imatrix", "symmetric", "noorder")
    ),
    "auto-round": Peer(
        "auto_round_.py", ("auto-round==0.16.*", "accelerate"), ("rtn", "iters50", "iters200", "ext", "sym")
    ),
    "auto-scheme": Peer(
        "auto_scheme_.py", (),
        ("2348-iters200", "2348-rtn", "2348-opt", "248-iters200", "248-rtn", "248-opt"),
        bits=(), chooses=True, within="auto-round",
    ),
    "modelopt": Peer(
        "modelopt_.py", ("nvidia-modelopt==0.47.*", "transformers", "accelerate", "requests"),
        ("presets", "awq", "integers", "integers-mse"), bits=(), chooses=True,
    ),
}  # fmt: skip


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, which is made when it is missing."""
    if name == "qpruner":
        return Path(sys.executable)
    name = PEERS[name].within or name
    home = folder.expanduser().resolve() / name
    python, done = home / "bin" / "python", home / "installed"
    if done.exists():
        return python
    peer = PEERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    constraints = home.with_suffix(".constraints")
    constraints.write_text(TORCH + "\n")
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    install = [python, "-m", "pip", "install", "-q", "-c", constraints]
    subprocess.run([*install, *FIRST], check=True)
    subprocess.run([*install, *peer.packages], check=True)
    if peer.bare:
        subprocess.run([*install, "--no-deps", "--no-build-isolation", *peer.bare], check=True)
    done.write_text("\n".join((*peer.packages, *peer.bare)) + "\n")
    return python
