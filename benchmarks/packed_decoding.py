"""Claim: on a CPU, decoding one token reads packed weights of 1 to 8 bits faster than dense ones in bfloat16.

    python benchmarks/packed_decoding.py [--threads 1] [--shapes 4096x4096 4096x11008] [--tokens 1 4 16 64 256]
        [--peers torchao=ENV/bin/python bitsandbytes=ENV/bin/python] [--out FILE.json]

For every spec, each function that can compute the product, and the one that the layer chooses. All are measured in
turn, round after round, on weights that no cache holds: as many copies as fill CACHE_BYTES take turns. A row gives the
fastest time, the median over rounds of its ratio to the dense product of the same round, and the rate at which it reads
the stored bytes, beside that of a copy. Not every claim holds everywhere: rows below 1.00 say where it does not.

Peers are measured by this file in environments of their own, against the dense product there.
"""

import argparse
import copy
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch

CACHE_BYTES = 96 * 2**20  # three times the last-level cache of the machine it was written on
ROUNDS = 15


def in_turn(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; a call is given the round's number."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for i in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def copies(thing, size_bytes: int) -> list:
    return [thing, *(copy.deepcopy(thing) for _ in range(-(-CACHE_BYTES // size_bytes) - 1))]


def dense_linears(d_out: int, d_in: int) -> list:
    return copies(torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16), 2 * d_out * d_in)


def peer(name: str, d_out: int, d_in: int) -> torch.nn.Module:
    """A 4-bit linear of another library, groups of 64."""
    if name == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        model = torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16))
        quantize_(model, Int4WeightOnlyConfig(group_size=64, int4_packing_format="opaque"))
        return model
    if name == "bitsandbytes":
        from bitsandbytes.nn import Linear4bit

        layer = Linear4bit(d_in, d_out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight.data = torch.randn(d_out, d_in) * 0.02
        return layer.to("cpu").eval()
    raise SystemExit(f"no peer {name!r}; there are torchao and bitsandbytes")


def measure_peer(name: str, d_out: int, d_in: int, tokens: list[int]) -> list[dict]:
    layers, dense = copies(peer(name, d_out, d_in), d_out * d_in // 2), dense_linears(d_out, d_in)
    for layer in layers:  # what is done once, at the first product, is no part of one
        layer(torch.randn(1, d_in, dtype=torch.bfloat16))
    rows = []
    for n in tokens:
        x = torch.randn(n, d_in, dtype=torch.bfloat16)
        calls = {name: lambda i, x=x: layers[i % len(layers)](x), "dense": lambda i, x=x: dense[i % len(dense)](x)}
        rows += table(in_turn(calls, ROUNDS if n < 64 else 4), {name: None, "dense": 2 * d_out * d_in}, n)
    return rows


def ours():
    """Name -> (spec, the functions beside the one that the layer chooses)."""
    from qpruner.model.packed import products
    from qpruner.plan import INT8, NF4, QuantSpec

    integer = lambda bits, group, **kw: QuantSpec(bits=bits, grid="integer", group_size=group, **kw)
    unpacked = ("unpacked by tile", lambda x, layer: products.by_tile(products.product_of_values, x, layer))
    ordered = ("4-bit order", lambda x, layer: layer.arranged(make=True).product(x, layer.steps))
    codes = ("codes by tile", lambda x, layer: products.by_tile(products.product_of_codes, x, layer))
    compiled = ("compiled", products.product_compiled)
    both, four = (unpacked, ordered), (unpacked, ordered, compiled)
    return {
        "nf4 g64": (NF4, (unpacked, compiled)),
        "int4 g32": (integer(4, 32), four),
        "int4 g128": (integer(4, 128), four),
        "int4 g32 asymmetric": (integer(4, 32, symmetric=False), four),
        "int4 g128 asymmetric": (integer(4, 128, symmetric=False), four),
        "int3 g64": (integer(3, 64), both),
        "int2 g64": (integer(2, 64), both),
        "ternary g64": (QuantSpec(bits=2, grid="ternary", group_size=64), (unpacked,)),
        "binary g64": (QuantSpec(bits=1, grid="binary", group_size=64), both),
        "int8": (INT8, (codes, unpacked)),
        "int8, inputs int8": (INT8.model_copy(update={"activation_bits": 8}), ()),
    }


def measure_ours(d_out: int, d_in: int, tokens: list[int], only: list[str]) -> list[dict]:
    from qpruner.model.packed.linear import PackedLinear

    W, dense, rows = torch.randn(d_out, d_in) * 0.02, dense_linears(d_out, d_in), []
    source, target = (torch.empty(CACHE_BYTES, dtype=torch.uint8) for _ in range(2))
    for name, (spec, functions) in ours().items():
        if only and name not in only:
            continue
        layer = PackedLinear.from_weight(W, None, spec)
        size = sum(b.nbytes for b in layer.buffers())
        chosen = copies(layer, size)
        # Functions that want one order of the codes have layers of their own.
        others = {label: copies(copy.deepcopy(layer), size) for label, _ in functions}
        for n in tokens:
            x = torch.randn(n, d_in, dtype=torch.bfloat16)
            calls = {"dense": lambda i, x=x: dense[i % len(dense)](x), "copy": lambda i: target.copy_(source)}
            calls[f"{name}: chosen"] = lambda i, x=x, pool=chosen: pool[i % len(pool)](x)
            for label, function in functions:
                pool = others[label]
                calls[f"{name}: {label}"] = lambda i, x=x, f=function, pool=pool: f(x, pool[i % len(pool)])
            first = [(lambda x, layer: layer(x), chosen), *((f, others[label]) for label, f in functions)]
            for function, pool in first:
                for one in pool:  # into its order, which is not part of a product
                    function(x, one)
            seconds = in_turn(calls, ROUNDS if n < 64 else 4)
            sizes = {key: size for key in calls} | {"dense": 2 * d_out * d_in, "copy": CACHE_BYTES}
            rows += table(seconds, sizes, n)
    return rows


def table(seconds: dict[str, list[float]], sizes: dict[str, int | None], n_tokens: int) -> list[dict]:
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(d / t for d, t in zip(seconds["dense"], times, strict=True))
        rate = None if sizes[name] is None else sizes[name] / min(times) / 1e9
        row = dict(name=name, tokens=n_tokens, ms=1e3 * min(times), times_dense=ratio, GB_per_s=rate)
        rows.append(row)
        said = "" if rate is None else f"{rate:7.2f} GB/s"
        print(f"{n_tokens:4} tokens  {name:40} {row['ms']:9.2f} ms  {ratio:6.2f} x dense  {said}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096"], help="d_in x d_out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--only", nargs="+", default=[], help="names of specs")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--peer", help="measure this one, here, and nothing else")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = {}
    with torch.inference_mode():
        for shape in args.shapes:
            d_in, d_out = map(int, shape.split("x"))
            print(f"{args.peer or 'qpruner'}, {shape}, {args.threads} threads, torch {torch.__version__}")
            if args.peer:
                results[shape] = measure_peer(args.peer, d_out, d_in, args.tokens)
            else:
                results[shape] = measure_ours(d_out, d_in, args.tokens, args.only)
    for name, python in (pair.split("=", 1) for pair in args.peers):
        command = [python, __file__, "--peer", name, "--threads", str(args.threads), "--shapes", *args.shapes]
        subprocess.run([*command, "--tokens", *map(str, args.tokens)], check=False)
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = dict(commit=commit, date=time.strftime("%Y-%m-%d"), threads=args.threads, torch=torch.__version__)
        args.out.write_text(json.dumps(about | {"seed": 0, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
