"""What it takes to serve a model or an artifact: memory, over how many devices it divides, and the commands."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from qpruner.artifact.save import weight_bytes
from qpruner.body import Body, body_of
from qpruner.errors import ModelError
from qpruner.loading import Loads, loading
from qpruner.model.load import Source, quiet
from qpruner.report.facts import bytes_text
from qpruner.vllm import Verdict, uneven, vllm_verdict

DEVICES = (1, 2, 4, 8, 16)
CACHE_BYTES = 2  # of a number in the cache: 16 bits, as servers have it unless told otherwise
TRIED = 3  # tokens of which a cache is looked at


@dataclass(frozen=True)
class CacheLayer:
    """What a layer's cache holds of a token, in bytes at 16 bits; kv_heads: heads that have keys. window: tokens after
    which it forgets; None for never."""

    bytes_per_token: int
    kv_heads: int
    window: int | None

    def at(self, context: int) -> int:
        return self.bytes_per_token * min(context, self.window or context)


@dataclass(frozen=True)
class Serving:
    """weight_bytes: of the files. context, batch: tokens of a sequence, and how many sequences at once.

    devices: over how many the heads and channels of every layer divide; reason: why not over the next.
    vllm: what vLLM's rules say of the folder as it is.
    """

    name: str
    weight_bytes: int
    cache: tuple[CacheLayer, ...]
    context: int
    batch: int
    devices: tuple[int, ...]
    reason: str
    places: tuple[Loads, ...]
    vllm: tuple[Verdict, ...]

    @cached_property
    def cache_bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.cache)

    @property
    def cache_bytes(self) -> int:
        return self.batch * sum(layer.at(self.context) for layer in self.cache)

    def to_json(self) -> dict:
        more = {name: getattr(self, name) for name in ("cache_bytes_per_token", "cache_bytes")}
        return asdict(self) | more | {"total_bytes": self.weight_bytes + self.cache_bytes}

    def lines(self) -> list[str]:
        """For people."""
        heads = [layer.kv_heads for layer in self.cache]
        each = f"{heads[0]} in every layer" if len(set(heads)) == 1 else f"{min(heads)} to {max(heads)} in a layer"
        sequences = "sequence" if self.batch == 1 else "sequences"
        total = self.weight_bytes + self.cache_bytes
        said = [
            f"weights   {self.weight_bytes:,} bytes ({bytes_text(self.weight_bytes)})",
            f"cache     {self.cache_bytes_per_token:,} bytes for each token at 16 bits; key/value heads: {each}",
            f"          {self.cache_bytes:,} bytes for {self.batch} {sequences} of {self.context:,} tokens",
            f"together  {total:,} bytes ({bytes_text(total)}), and what the program itself takes",
            f"devices   divides over {', '.join(map(str, self.devices))}" + (f"; {self.reason}" * bool(self.reason)),
        ]
        for place in self.places:
            said += ["", str(place), *([f"    {place.command}"] if place.command else [])]
        return [
            *said,
            "",
            "of the folder as it is, by vLLM's sources (it was not run):",
            *(f"    {v}" for v in self.vllm),
        ]


def serve_check(source: Source, *, context: int | None = None, batch: int = 1) -> Serving:
    """What serving takes.

    Args:
        context: tokens of a sequence; by default the most that the model takes, 4096 where it sets no limit.
        batch: sequences at once.
    Raises:
        ModelError: no weights were named, or what the model keeps of a token is not known.
    """
    if source.folder is None or not source.tensors:
        raise ModelError(f"{source.name!r} is a configuration without weights; name the folder that holds both.")
    body = body_of(source)
    cache = cache_of(body)
    devices, reason = divides_over(body)
    length = context or source.context_length or 4096
    rows = loading(body, str(source.folder))
    return Serving(
        source.name,
        weight_bytes(source.folder),
        cache,
        length,
        batch,
        devices,
        reason,
        rows,
        tuple(vllm_verdict(source.folder)),
    )


def cache_of(body: Body) -> tuple[CacheLayer, ...]:
    """What is kept of a token in every layer: seen from the cache that the model fills, on the meta device."""
    model = copy.deepcopy(body.model).to("meta", torch.bfloat16)
    ids = torch.zeros(1, TRIED, dtype=torch.long, device="meta")
    try:
        with quiet(), torch.no_grad():
            layers = model(input_ids=ids, use_cache=True).past_key_values.layers
        found = [(layer.keys, layer.values, getattr(layer, "sliding_window", None)) for layer in layers]
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"what {body.name!r} ({body.config.model_type!r}) keeps of a token cannot be seen without running it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}."
        ) from error
    return tuple(
        CacheLayer(CACHE_BYTES * (keys.numel() + values.numel()) // TRIED, keys.shape[1], window)
        for keys, values, window in found
    )


def divides_over(body: Body) -> tuple[tuple[int, ...], str]:
    """Numbers of devices over which tensor parallelism cuts every layer evenly, and why not over the next."""
    fitting, reason = [], ""
    for n in DEVICES:
        objection = _objection(body, n) if n > 1 else ""
        if objection and not reason:
            reason = f"over {n} not: {objection}"
        fitting += [] if objection else [n]
    return tuple(fitting), reason


def _objection(body: Body, n: int) -> str:
    for index, layer in enumerate(body.widths):
        if odd := next(uneven(layer, n), None):
            return f"layer {index} has {layer}, and {odd} do not divide"
    return _cut_groups(body, n)


def _cut_groups(body: Body, n: int) -> str:
    """Codes are cut along the inputs of the last linear of attention and MLP, at the ends of groups."""
    ends: Sequence[str] = [p.linears[0] for p in body.graph.projections if len(p.linears) == 1]
    for name in ends:
        spec, d_in = body.specs[name]
        if spec.bits < 16 and spec.group_size and d_in % math.lcm(n, n * spec.group_size):
            return f"{name} has {d_in} inputs in groups of {spec.group_size}"
    return ""
