"""What is known of a model before anything runs: groups, sizes, what a recipe would leave, and what loads it."""

from collections import Counter
from dataclasses import asdict

from qpruner import recipe as recipes
from qpruner.artifact.save import weight_bytes
from qpruner.body import body_of, body_of_plan
from qpruner.decide import widths
from qpruner.errors import MemoryLimitError
from qpruner.joint.points import counts_for
from qpruner.loading import loading
from qpruner.model import cost, load
from qpruner.model.depth import shortened_config
from qpruner.plan import Budget
from qpruner.prepare import limit_of
from qpruner.recipe import Recipe
from qpruner.shape import any_layers, forecast_for, require_original, shape_of


def inspect(model: str, *, recipe: str | Recipe | None, budget: str | None, trust_remote_code: bool) -> dict:
    """See `qpruner.api.inspect`."""

    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    place = str(source.folder or source.name)
    if source.parameters is None:
        return _inspected(source, body_of(source), recipe, budget)
    shape = shape_of(source)
    found = {
        "model": source.name,
        "architecture": (source.config.architectures or [source.config.model_type])[0],
        "parameters": source.parameters,
        "bytes_16bit": source.bytes_16bit,
        "layers": len(shape.graph.layers),
        "groups": [
            {"name": g.name, "layer": g.layer, "kind": g.kind, "units": g.n_units, "prunable": g.n_units > g.n_blocks}
            for g in shape.graph.groups.values()
        ],
        "notes": list(shape.graph.notes),
        "loads_in": [row.to_json() for row in loading(body_of(source), place)],
    }
    if recipe is None and budget is None:
        return found
    chosen = recipes.load(recipe or "qpruner") if not isinstance(recipe, Recipe) else recipe
    limit = limit_of(Budget.parse(budget), source) if budget else source.bytes_16bit
    shape = any_layers(shape, chosen, limit)
    counts = counts_for(shape, chosen, limit)
    kept = widths.first_units(shape.graph, counts)
    sizes = {bits: shape.size(shape.plan(chosen, kept, bits)) for bits in chosen.bits}
    stored = shape.stored(shape.plan(chosen, kept, 16, embeddings={}))
    largest = max((s.total for s in sizes.values() if s.total <= limit), default=min(s.total for s in sizes.values()))
    length = min(chosen.window, source.context_length or chosen.window)
    try:
        stages = forecast_for(shape, chosen, counts, length, None).stages
    except MemoryLimitError as error:
        stages = {}
        found["notes"].append(str(error))
    found["predicted"] = {
        "recipe": chosen.name,
        "layers": len(shape.graph.layers),
        "parameters": cost.parameter_count(stored),
        "bytes": min(limit, sizes[chosen.bits[-1]].total) if len(chosen.bits) > 1 else largest,
        "limit_bytes": limit,
        "bytes_by_bits": {str(bits): s.total for bits, s in sizes.items()},
        "kept": counts,
        "memory_bytes": stages,
    }
    config = shortened_config(source.config, shape.layers)
    body = body_of_plan(source, config, shape.graph, shape.plan(chosen, kept, chosen.bits[0]))
    found["predicted"]["loads_in"] = [row.to_json() for row in loading(body, "OUT")]
    if chosen.allocation == "joint" or chosen.scope == "global":
        found["predicted"]["note"] = (
            "Widths here are the same in every layer; this recipe may leave each layer another one, and then the stock "
            "class and llama.cpp take it only where the sentences speak of layers."
        )
    return found


def _inspected(source: load.Source, body, recipe, budget) -> dict:
    """Of an artifact, of which there is nothing to predict."""

    if recipe is not None or budget is not None:
        require_original(source)
    formats = Counter(str(spec) for spec, _ in body.specs.values())
    return {
        "model": source.name,
        "architecture": (body.config.architectures or [body.config.model_type])[0],
        "bytes": weight_bytes(source.folder),
        "layers": [asdict(layer) for layer in body.widths],
        "formats": dict(formats) | {name: str(spec) for name, spec in body.embeddings.items()},
        "adapters": "beside" if body.adapters_beside else "none beside",
        "loads_in": [row.to_json() for row in loading(body, str(source.folder))],
    }
