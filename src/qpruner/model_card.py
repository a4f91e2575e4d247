"""The card of an artifact: what the manifest and the plan say, in Markdown with the front matter that hubs read.

The same artifact has the same card: nothing in it depends on when, where or how fast the artifact was made.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from qpruner.body import Body
from qpruner.loading import Loads
from qpruner.model import cost
from qpruner.report.facts import bytes_text, measured_text

CARRIED = ("license", "license_name", "license_link", "language", "datasets", "tags")
TAGS = ("qpruner", "pruned", "quantized")


def card_of(manifest: dict, body: Body, rows: Sequence[Loads], original: Path | None) -> str:
    """Markdown.

    Args:
        manifest: of the artifact, as its manifest.json.
        body: what is left of the original, and how it is stored.
        rows: what the folder loads in, under the name OUT.
        original: the card of the original, if it has one.
    """
    known = front_matter(original)
    head = {key: known[key] for key in CARRIED if known.get(key)}
    pruned = any(len(body.kept[name]) < group.n_units for name, group in body.graph.groups.items())
    words = [*known.get("tags", ()), TAGS[0], *TAGS[1:2] * pruned, *TAGS[2:] * body.coded]
    head |= {
        "base_model": manifest["base_model"],
        "library_name": "transformers",
        "pipeline_tag": known.get("pipeline_tag", "text-generation"),
        "tags": list(dict.fromkeys(words)),
    }
    sections = [
        "---\n" + yaml.safe_dump(head, sort_keys=True, allow_unicode=True) + "---",
        f"# {manifest['base_model'].rpartition('/')[2]}, compressed to {bytes_text(manifest['bytes']['on_disk'])}",
        _origin(manifest, known),
        "## What was done\n\n" + _done(body),
        "## What it costs\n\n" + _measured(manifest),
        "## Sizes\n\n" + _sizes(manifest),
        "## Load it\n\n" + "\n".join(_place(row) for row in rows),
        "## Make it again\n\n" + _again(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def front_matter(card: Path | None) -> dict:
    """What the card of an original says of itself; nothing where it has none, or one that cannot be read."""
    if card is None or not card.is_file():
        return {}
    try:
        if not card.read_text(encoding="utf-8").startswith("---"):  # a page of text alone
            return {}
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return {key: [value] if key == "tags" and isinstance(value, str) else value for key, value in found.items()}


def _origin(manifest: dict, known: dict) -> str:
    language = known.get("language", "not stated")
    said = [
        f"Made from `{manifest['base_model']}` by {manifest['made_by']}.",
        f"License of the original: {known.get('license_name') or known.get('license', 'not stated')}.",
        f"Language: {language if isinstance(language, str) else ', '.join(language)}.",
    ]
    return " ".join(said)


def _done(body: Body) -> str:
    """Widths and bits of every layer, alike layers in one row."""
    of_layer: dict[int, Counter] = {}
    for name, (spec, _) in body.specs.items():
        of_layer.setdefault(body.graph.linears[name].layer, Counter())[str(spec)] += 1
    rows = ["| layers | heads | key/value heads | channels | linears |", "|---|---|---|---|---|"]
    first = 0
    described = [
        (layer.heads, layer.kv_heads, layer.channels, _counted(of_layer.get(i, Counter())))
        for i, layer in enumerate(body.widths)
    ]
    for i, each in enumerate(described):
        if i + 1 == len(described) or described[i + 1] != each:
            span = str(i) if first == i else f"{first} to {i}"
            rows.append("| " + " | ".join([span, *map(str, each)]) + " |")
            first = i + 1
    notes = []
    if body.plan and body.plan.layers is not None:
        kept = ", ".join(map(str, body.plan.layers))
        notes.append(f"Layers of the original that stay: {kept}; above they are numbered anew.")
    notes += [f"`{name}`: {spec}." for name, spec in body.embeddings.items()]
    if body.plan and body.plan.adapter_ranks:
        ranks = sorted(set(body.plan.adapter_ranks.values()))
        where = "beside the weights, in `adapter/`" if body.adapters_beside else "added into the weights"
        notes.append(f"{len(body.plan.adapter_ranks)} adapters of rank {', '.join(map(str, ranks))}, {where}.")
    return "\n".join(rows) + "".join(f"\n\n{note}" for note in notes)


def _counted(specs: Counter) -> str:
    return ", ".join(f"{n} x {spec}" for spec, n in sorted(specs.items()))


def _measured(manifest: dict) -> str:
    found = manifest["evaluation"]
    before, after = found["original"], found["artifact"]
    rows = ["| | original | this |", "|---|---|---|"]
    for name, key, error in (
        ("loss (nats/token)", "loss", "standard_error"),
        ("perplexity", "perplexity", "perplexity_standard_error"),
        ("bits per byte", "bits_per_byte", None),
    ):
        if key in after:
            texts = [measured_text(part[key], part.get(error)) for part in (before, after)]
            rows.append(f"| {name} | {texts[0]} | {texts[1]} |")
    if kl := found.get("kl"):
        rows.append(f"| KL to the original (nats/token) | | {measured_text(kl['kl'], kl.get('standard_error'))} |")
        if "top1_agreement" in kl:
            rows.append(f"| same first choice (%) | | {measured_text(100 * kl['top1_agreement'])} |")
    return "\n".join(rows) + f"\n\nValue ± standard error. Protocol: {after['protocol']}."


def _sizes(manifest: dict) -> str:
    sizes = manifest["bytes"]
    names = {
        "original_16bit": "the original at 16 bits", "asked": "asked for", "predicted": "predicted from the plan",
        "on_disk": "weight files",
    }  # fmt: skip
    rows = [f"| {said} | {sizes[key]:,} |" for key, said in names.items()]
    rows += [f"| of these {part} | {n:,} |" for part, n in sizes["parts"].items() if n]
    return "| | bytes |\n|---|---|\n" + "\n".join(rows)


def _place(row: Loads) -> str:
    said = f"* **{row.target}**: {'' if row.loads else 'not as it is; '}{row.sentence}"
    return said + (f"\n\n      {row.command}\n" if row.command else "")


def _again(manifest: dict) -> str:
    recipe = manifest["recipe"]
    words = ["qpruner", "compress", manifest["base_model"], "--budget", manifest["budget"]]
    words += ["--recipe", recipe["name"], "--seed", str(manifest["seed"]), "-o", "OUT"]
    texts = [f"{name} `{str(digest)[:12]}`" for name, digest in sorted(manifest["digests"]["texts"].items())]
    return (
        f"    {shlex.join(words)}\n\nwith the recipe's keys as in `manifest.json`, and texts of these digests: "
        f"{', '.join(texts)}. The same seed gives the same bytes."
    )


def parameters_of(body: Body) -> int:
    """That are left, tied tensors once."""
    return cost.parameter_count(cost.named_tensors(body.model))
