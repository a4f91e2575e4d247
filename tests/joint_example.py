"""Facts of a joint search for tests: realistic, not measured."""

import math
import random

from qpruner.report.facts import Stage
from qpruner.report.joint import (
    GateLayer,
    Gates,
    GateStep,
    JointFacts,
    Layer,
    Limit,
    Option,
    Point,
    Prediction,
    Sensitivity,
    Stored,
    Trial,
)

LIMITS = (("50%", 0.5), ("40%", 0.4), ("30%", 0.3), ("25%", 0.25), ("20%", 0.2), ("15%", 0.15))
ORIGINS = ("mutual information", "sensitivity at 2623104", "gates at 2098483", "random", "surrogate")
CONTROLS = {"random search": 2.2, "greedy by sensitivity": 1.5, "NSGA-II": 1.7, "prune, then allocate": 1.35}
PROJECTIONS = (
    ("self_attn.q_proj, k_proj, v_proj", "kv_group", 98_304),
    ("self_attn.o_proj", "kv_group", 65_536),
    ("mlp.gate_proj, up_proj", "channel", 393_216),
    ("mlp.down_proj", "channel", 196_608),
)
BYTES_16BIT = 10_492_416
EMBEDDING, CHANNELS = 1_048_576, 768


def example_joint_facts(n_layers: int = 6, n_trials: int = 60, model_name: str = "pystdlib-5M") -> JointFacts:
    draw = random.Random(0)
    size_of = lambda share: int(share * BYTES_16BIT)
    ideal = lambda share: 0.004 * share**-2.6  # what no plan beats
    trials = [_trial(i, draw, n_layers, ideal) for i in range(n_trials)]
    whole = max(t.n_windows for t in trials)
    known = [t for t in trials if t.loss is not None and t.n_windows == whole]
    front = [t for t in known if not any(u.size_bytes <= t.size_bytes and u.loss < t.loss for u in known)]
    limits = []
    for text, share in LIMITS:
        inside = [t for t in front if t.size_bytes <= size_of(share)]
        if inside:
            best = min(inside, key=lambda t: t.loss)
            limits.append(_limit(draw, text, size_of(share), best, n_layers, model_name))
        else:
            limits.append(Limit(text=text, size_bytes=size_of(share)))
    return JointFacts(
        model_name=model_name,
        dense_bytes=2 * BYTES_16BIT,
        bytes_16bit=BYTES_16BIT,
        n_layers=n_layers,
        protocol="Search text: 32 windows of 511 tokens with <s> in front, float32; standard errors over windows.",
        limits=tuple(limits),
        trials=tuple(trials),
        front=tuple(t.number for t in front),
        controls={
            name: tuple(Point(size_bytes=size_of(share) - 900, loss=worse * ideal(share)) for _, share in LIMITS)
            for name, worse in CONTROLS.items()
        },
        random_plans=tuple(
            Prediction(predicted=p, measured=p * math.exp(draw.gauss(0.1, 0.2)))
            for p in (math.exp(draw.uniform(-4, 0.5)) for _ in range(20))
        ),
        surrogate=tuple(
            Prediction(trial=t.number, predicted=(t.loss or 0.1) * math.exp(draw.gauss(0, 0.1)), measured=t.loss)
            for t in trials
            if t.origin == "surrogate"
        ),
        sensitivities=tuple(_sensitivities(draw, n_layers)),
        gates=_gates(draw, n_layers, size_of),
        passes_per_trial=0.83,
        command=f"qpruner search {model_name} --budgets 50%,40%,30%,25%,20%,15% -o build/search --seed 0",
        machine="2 cores of an x86-64 server, 8 GiB of memory, no accelerator",
        seed=0,
        versions={"qpruner": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "botorch": "0.16.1"},
        stages=tuple(
            Stage(name=n, seconds=s)
            for n, s in [("candidates", 38.0), ("sensitivities", 51.2), ("gates", 44.9), ("trials", 212.5)]
        ),
        warnings=("One worker died; its trial was lost.",),
        notes=("Layers 0 and 5 may not go as a whole.",),
    )  # fmt: skip


def _trial(number: int, draw: random.Random, n_layers: int, ideal) -> Trial:
    origin = ORIGINS[min(number // 3, 4)] if number < 15 else "surrogate"
    share = draw.choice([s for _, s in LIMITS]) * draw.uniform(0.96, 1.0)
    loss = ideal(share) * math.exp(abs(draw.gauss(0, 0.9 if origin == "random" else 0.35)))
    early = number % 11 == 7
    return Trial(
        number=number,
        origin=origin,
        size_bytes=int(share * BYTES_16BIT),
        loss=None if number == 23 else loss,
        standard_error=None if number == 23 else 0.03 * loss,
        n_windows=8 if early else 32,
        n_layers=n_layers - draw.choice([0, 0, 1]),
        kv_groups_kept=draw.uniform(0.6, 1),
        channels_kept=draw.uniform(0.5, 1),
        bits_per_weight=draw.uniform(2.5, 6),
    )


def _limit(draw: random.Random, text: str, size: int, trial: Trial, n_layers: int, model_name: str) -> Limit:
    layers = []
    for i in range(n_layers):
        kv, channels = draw.choice([2, 3, 4]), draw.choice([256, 384, 512, 640, 768])
        share = {"kv_group": kv / 4, "channel": channels / CHANNELS}
        stored = []
        for name, units, weights in PROJECTIONS:
            bits, parameters = draw.choice([2, 3, 3, 4, 8]), int(weights * share[units])
            spec = f"int{bits} g{draw.choice([16, 64])} asymmetric scales of 4 bits"
            stored.append(
                Stored(
                    name=f"model.layers.{i}.{name}", spec=spec, bits=bits, units=units, parameters=parameters,
                    size_bytes=parameters * bits // 8 + parameters // 32,
                )
            )  # fmt: skip
        layers.append(
            Layer(
                index=i, stays=n_layers - trial.n_layers == 0 or i != n_layers // 2, kv_groups_kept=kv,
                kv_groups_total=4, channels_kept=channels, channels_total=CHANNELS, projections=tuple(stored),
            )
        )  # fmt: skip
    embedding = Stored(
        name="model.embed_tokens", spec="int4 g16 asymmetric", bits=4, parameters=EMBEDDING, size_bytes=EMBEDDING // 2
    )
    linears = sum(p.size_bytes for la in layers if la.stays for p in la.projections)
    return Limit(
        text=text, size_bytes=size, stored_bytes=trial.size_bytes, trial=trial.number, loss=trial.loss,
        standard_error=trial.standard_error, layers=tuple(layers), embeddings=(embedding,),
        command=f"qpruner compress {model_name} --budget {text} --from build/search -o build/{text.rstrip('%')}",
        parts={"linears": linears, "embeddings": EMBEDDING // 2, "other": 6_656, "headers": 9_840},
    )  # fmt: skip


def _sensitivities(draw: random.Random, n_layers: int):
    for i in range(n_layers):
        where = f"model.layers.{i}"
        scale = 0.02 * math.exp(draw.gauss(-0.25 * i, 0.4))
        option = lambda words, cost, measured=True: Option(
            words=words, estimated=cost, measured=cost * math.exp(draw.gauss(0, 0.2)) if measured else None
        )
        if 0 < i < n_layers - 1:
            options = (option("goes", 9 * scale), Option(words="stays", estimated=0.0, measured=0.0))
            yield Sensitivity(name=where, kind="layer", layer=i, options=options)
        for name, total in (("self_attn", 4), ("mlp", CHANNELS)):
            options = [option(f"{int(f * total)} of {total} units", scale * (1 - f) ** 2 * 8) for f in (0.5, 0.75)]
            options.append(Option(words=f"{total} of {total} units", estimated=0.0, measured=0.0))
            yield Sensitivity(name=f"{where}.{name}", kind="width", layer=i, options=tuple(options))
        for name, _, weights in PROJECTIONS:
            cost = scale * weights / 2e5
            options = [option(f"int{b} g16", cost * 4.0 ** (2 - b) * 3, measured=b < 8) for b in (2, 3, 4, 8)]
            yield Sensitivity(name=f"{where}.{name}", kind="bits", layer=i, options=tuple(options))
    options = tuple(
        Option(words=w, estimated=c, measured=1.1 * c) for w, c in (("int3", 0.08), ("int4", 0.012), ("int8", 1e-4))
    )
    yield Sensitivity(name="model.embed_tokens", kind="bits", layer=-1, options=options)


def _gates(draw: random.Random, n_layers: int, size_of) -> Gates:
    curve = tuple(
        GateStep(
            step=s,
            loss=0.02 + 0.9 * math.exp(-s / 60) + 0.02 * draw.random(),
            size_bytes=size_of(0.15 + 0.4 * math.exp(-s / 80)),
        )
        for s in range(1, 301, 3)
    )
    at = {}
    for text, share in LIMITS:
        kept = [min(1.0, draw.uniform(0.7, 1.1) * (0.5 + share)) for _ in range(n_layers)]
        if share < 0.25:
            kept[n_layers // 2] = 0.0
        at[text] = tuple(
            GateLayer(layer=i, kept=k, bits=draw.uniform(8, 16) * share + 1 if k else None) for i, k in enumerate(kept)
        )
    return Gates(curve=curve, at=at)
