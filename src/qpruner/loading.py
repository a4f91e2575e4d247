"""What a model or an artifact loads in, and why not elsewhere: a sentence and a command for each place.

Known before anything runs, from a plan; and of what was written, from its folder. Nothing is loaded here: the rules
are those of `qpruner.targets`, of transformers' own classes and of llama.cpp's architectures.
"""

from dataclasses import asdict, dataclass

from qpruner.artifact.compressed.schemes import out_of_reach
from qpruner.artifact.compressed.schemes import refused as refused_codes
from qpruner.artifact.gguf.families import anatomy, choose
from qpruner.body import Body
from qpruner.errors import ModelError, listed
from qpruner.plan import DENSE
from qpruner.vllm import OWN_LINEARS, serve_options

LOAD = "AutoModelForCausalLM.from_pretrained({name!r}{options})"
PYTHON = 'python -c "{imports}from transformers import AutoModelForCausalLM; ' + LOAD + '"'
TARGETS = (
    "transformers with qpruner", "transformers alone", "transformers with remote code", "vLLM", "llama.cpp",
    "transformers with compressed-tensors", "vLLM's DeciLM",
)  # fmt: skip


@dataclass(frozen=True)
class Loads:
    """One place: whether the folder as it is loads there, a sentence, the command that loads it or makes it load."""

    target: str
    loads: bool
    sentence: str
    command: str = ""

    def to_json(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.target}: {'yes' if self.loads else 'no'}; {self.sentence}"


def loading(body: Body, name: str) -> tuple[Loads, ...]:
    """For each of `TARGETS`, whether a folder of this name would load there.

    Args:
        name: of the folder, for commands.
    """
    return tuple(loads_in(target, body, name) for target in TARGETS)


def loads_in(target: str, body: Body, name: str) -> Loads:
    """Whether a folder of this name would load in one of `TARGETS`."""
    places = (_with_us, _alone, _remote, _vllm, _llama_cpp, _compressed_tensors, _deci)
    return dict(zip(TARGETS, places, strict=True))[target](body, name)


def _options(body: Body) -> str:
    return ", trust_remote_code=True" if body.code == "its own" else ""


def _with_us(body: Body, name: str) -> Loads:
    imports = "" if body.stock else "import qpruner; "
    said = "an instance of the original class" + (", with adapters beside it" if body.adapters_beside else "")
    command = PYTHON.format(imports=imports, name=name, options=_options(body))
    return Loads(TARGETS[0], True, f"it comes as {said}.", command)


def _alone(body: Body, name: str) -> Loads:
    target = TARGETS[1]
    if body.stock and body.code != "its own":
        command = PYTHON.format(imports="", name=name, options="")
        return Loads(target, True, f"a stock model of type {body.config.model_type!r}.", command)
    if body.code == "its own":
        return Loads(target, False, "the original brought code of its own.")
    export = f"qpruner export {name} --to hf"
    if not body.holds_as_stock:
        if reason := body.why_not_filled:
            return Loads(target, False, f"{body.why_not_stock()}; {reason}.")
        return Loads(target, False, f"{body.why_not_stock()}; zeros can fill it up.", f"{export} --padded")
    parts = [
        "weights lie in codes" if body.coded else "",
        "adapters lie beside them" if body.adapters_beside else "",
    ]
    what = " and ".join(filter(None, parts))
    return Loads(target, False, f"{what}; the export is of 16 bits.", export)


def _remote(body: Body, name: str) -> Loads:
    target = TARGETS[2]
    command = PYTHON.format(imports="", name=name, options=", trust_remote_code=True")
    if body.code == "its own" and body.stock:
        return Loads(target, True, "by the code that came with the original.", command)
    if body.code == "ours":
        return Loads(target, True, "by the Python files in the folder, without qpruner.", command)
    if body.code == "its own":
        return Loads(target, False, "the original brought code of its own, which does not know what was done to it.")
    if body.stock:
        return Loads(target, True, "no code is needed.", PYTHON.format(imports="", name=name, options=""))
    if reason := body.why_no_code():
        return Loads(target, False, reason)
    said = "the folder holds no code yet; an export puts it beside the weights, which stay in codes."
    return Loads(target, False, said, f"qpruner export {name} --to hf --with-code")


def _vllm(body: Body, name: str) -> Loads:
    target, config = TARGETS[3], body.config.to_dict()
    served = lambda folder, options: " ".join(("vllm serve", folder, *options))
    if body.stock:
        return Loads(target, True, "a stock model of 16 bits.", served(name, serve_options(config)))
    said = [body.why_not_in("vllm", body.specs)]
    if body.embeddings:
        said.append(f"{listed(body.embeddings)} lies in codes, which vLLM wants at 16 bits.")
    if not body.holds_as_stock and (reason := body.why_no_code()):
        said.append(reason)
    if _strange(body) or (not body.holds_as_stock and out_of_reach(body.original, body.specs)):
        said.append(f"{OWN_LINEARS[0].upper()}{OWN_LINEARS[1:]}")
    if any(said):
        return Loads(target, False, " ".join(filter(None, said)))
    options = serve_options(body.as_stock.to_dict()) if body.as_stock else ("--trust-remote-code",)
    by = "." if body.holds_as_stock else ", with code that builds layers of their own widths."
    export = f"qpruner export {name} --to compressed-tensors -o {name}-vllm && {served(f'{name}-vllm', options)}"
    return Loads(target, False, f"exported as compressed-tensors its rules are kept{by}", export)


def _llama_cpp(body: Body, name: str) -> Loads:
    target = TARGETS[4]
    try:
        architecture = choose(anatomy(body.model)).name
    except ModelError as error:
        return Loads(target, False, str(error))
    command = f"qpruner export {name} --to gguf -o {name}.gguf && llama-cli -m {name}.gguf"
    return Loads(target, False, f"exported as GGUF, architecture {architecture!r}.", command)


def _compressed_tensors(body: Body, name: str) -> Loads:
    target = TARGETS[5]
    if body.code == "its own":
        return Loads(target, False, "the original brought code of its own.")
    if body.stock:
        command = PYTHON.format(imports="", name=name, options="")
        return Loads(target, True, "nothing lies in codes: it is a stock model.", command)
    export = f"qpruner export {name} --to compressed-tensors"
    if said := refused_codes(body.specs):
        return Loads(target, False, f"{said}; they can be rounded once more.", f"{export} --round-again")
    if body.holds_as_stock and not _strange(body):
        where = ""
    else:
        where = ", and qpruner imported" if body.why_no_code() else ", by code in the folder or qpruner imported"
    return Loads(target, False, f"exported in its format, with compressed-tensors installed{where}.", export)


def _strange(body: Body) -> list[str]:
    """Linears that are to lie in codes, and multiply in a way of their own."""
    return out_of_reach(body.original, (linear for linear, (spec, _) in body.specs.items() if spec != DENSE))


def _deci(body: Body, name: str) -> Loads:
    target = TARGETS[6]
    if body.code == "its own":
        return Loads(target, False, "the original brought code of its own.")
    if reason := body.why_not_in("deci", {}):
        return Loads(target, False, reason)
    export = f"qpruner export {name} --to deci"
    if said := refused_codes(body.specs):
        return Loads(target, False, f"{said}; they can be rounded once more.", f"{export} --round-again")
    return Loads(target, False, "exported in its form, which transformers takes too, by code in the folder.", export)
