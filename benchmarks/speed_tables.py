"""Write the tables of docs/speed.md from the files in results/benchmarks.

    python benchmarks/speed_tables.py            # rewrites the page
    python benchmarks/speed_tables.py --check    # exits with 1 where a table differs

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; everything else is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from common import ROOT

PAGE = ROOT / "docs/speed.md"
RESULTS = ROOT / "results/benchmarks"
PEAK = 792e12
"""FLOP/s of a product of 8192³ in bf16, to which MFU refers: the H200 of 2026-11-25."""
SHAPES = ((8, 4096), (1, 32768), (1, 65536))

Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def find(rows: Iterable[Row], **fields: Any) -> Row:
    """The one row with these fields.

    Raises:
        SystemExit: if there is none, or several.
    """
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    if len(found) != 1:
        raise SystemExit(f"results/benchmarks: got {len(found)} rows with {fields}; expected 1.")
    return found[0]


def ms(value: float) -> str:
    """Milliseconds with three digits, two behind the point at most; halves are rounded up, as printed numbers are."""
    places = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP))


def both(row: Row, forward: str, backward: str) -> str:
    return f"{ms(row[forward])} / {ms(row[backward])}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


# -- the tables ------------------------------------------------------------------------------------------------------

TRAINING = [
    ("340M full, batch 16", "full:340m:16", "stack"),
    ("340M full, batch 16, again", "full:340m:16 adamw", "stack"),
    ("… Muon, in the same run", "full:340m:16 muon", "stack"),
    ("340M full, batch 16", "full:340m:16", "bare"),
    ("340M, batch 16", "plain:340m:16", "plain"),
    ("340M full, batch 8", "full:340m:8", "stack"),
    ("340M sliding (window 512), batch 16", "sliding:340m:16", "stack"),
    ("340M mla, batch 16", "mla:340m:16", "stack"),
    ("340M grouped_latent, batch 16", "grouped_latent:340m:16", "stack"),
    ("340M moba, batch 8", "moba:340m:8", "stack"),
    ("340M deltanet, batch 16", "deltanet:340m:16", "stack"),
    ("340M gdn, batch 16", "gdn:340m:16", "stack"),
    ("340M gdn gdn gdn full, batch 16", "gdn+gdn+gdn+full:340m:16", "stack"),
    ("340M kda, batch 16", "kda:340m:16", "stack"),
    ("340M fg2_gdn, batch 16", "fg2_gdn:340m:16", "stack"),
    ("340M fg2_gdn_plus, batch 16", "fg2_gdn_plus:340m:16", "stack"),
    ("340M gdn2, batch 16", "gdn2:340m:16", "stack"),
    ("340M asa_local asa_global, batch 8", "asa_local+asa_global:340m:8", "stack"),
    ("340M nsa, batch 8", "nsa:340m:8", "stack"),
    ("340M active of 1.8B: 64 experts of 352, top 8, full, batch 8", "full:340m:8 moe", "stack"),
    ("… on another card", "full:340m:8 moe", "bare"),
    (
        "… on that card, gradient of the weights by torch's grouped product",
        "full:340m:8 moe, gradient of weights by torch",
        "bare",
    ),
    ("340M active of 1.8B: 32 experts of 704, top 4, full, batch 8", "full:340m:8 moe 32x704 top 4", "bare"),
    ("1.3B full, batch 8", "full:1.3b:8", "stack"),
    ("1.3B gdn gdn gdn full, batch 8", "gdn+gdn+gdn+full:1.3b:8", "stack"),
]
CACHED = {("gdn+gdn+gdn+full:340m:16", "stack"), ("full:340m:16 muon", "stack")} | {
    ("full:340m:8 moe, gradient of weights by torch", "bare")
}
"""Cases whose kernels an earlier case of the same run had compiled."""


def training() -> str:
    results = [r for r in load("train_throughput")["results"] if r["environment"]["device"].startswith("NVIDIA H200")]
    rows = []
    for label, case, mode in TRAINING:
        row = find(results, case=case, mode=mode)
        utilisation = f"{100 * row['flops_per_second'] / PEAK:.0f} %" if "flops_per_second" in row else ""
        seconds = row.get("seconds_to_first_step", row.get("seconds_of_compiled_step"))
        first = "" if seconds is None else f"{seconds:.0f}"
        if (case, mode) in CACHED:
            first += " (kernels in the cache)"
        rate = f"{row['tokens_per_second'] / 1e3:.1f}k"
        date = row["environment"]["date"]
        rows.append((label, mode, rate, utilisation, f"{row['peak_gib']:.1f}", first, date))
    return markdown(("model", "how", "tokens/s", "MFU", "peak GiB", "first step, s", "measured"), rows)


def delta_rule() -> str:
    results = load("delta_rule")["results"]
    shapes = {"8 × 4096": "8x4096x8x128", "1 × 32,768": "1x32768x8x128"}
    moderate = [r for r in results if r.get("decay", "moderate") == "moderate"]
    measured = {(r["variant"], r["shape"], r["implementation"]): r for r in moderate if "variant" in r}
    rows = []
    for variant in ("deltanet", "gdn", "kda", "fg2_gdn", "fg2_gdn_plus", "gdn2"):
        cells = [variant]
        for shape in shapes.values():
            for implementation in ("ours", "fla"):
                row = measured.get((variant, shape, implementation))
                if row is None:
                    cells.append("")
                else:
                    cells.append("refuses" if "error" in row else both(row, "forward_ms", "forward_backward_ms"))
        rows.append(cells)
    header = [f"{who}, {shape}" for shape in shapes for who in ("ours", "fla")]
    return markdown(["", *header], rows)


DOCUMENTS = [
    ("cuDNN causal, no documents", "cudnn causal, no segments"),
    ("flash (torch), causal, no documents", "flash causal, no segments"),
    ("FlexAttention, document mask", "flex document mask"),
    ("`varlen_attn`, exact lengths", "varlen_attn exact {'window_size': (-1, 0)}"),
    ("`varlen_attn`, padded lengths", "varlen_attn padded {'window_size': (-1, 0)}"),
    ("cuDNN with variable lengths, exact", "cudnn varlen exact"),
    ("cuDNN with variable lengths, padded", "cudnn varlen padded"),
    ("FlexAttention, documents and window 512", "flex document + window 512"),
    ("`varlen_attn`, exact lengths, window 512", "varlen window 512"),
]


def attention() -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    rows: list[Row] = []
    for row in load("attention_documents")["rows"]:
        if "kind" in row:  # the heading of those that follow
            rows = groups.setdefault((row["B"], row["T"], row["H"], row["D"], row["kind"]), [])
        rows.append(row)
    columns = [groups[16, 4096, 8, 128, kind] for kind in ("one", "docs")]
    table = [[label, *(both(find(column, op=op), "fwd", "fwdbwd") for column in columns)] for label, op in DOCUMENTS]
    return markdown(("", "one document a row", "documents of 530 tokens on average"), table)


_LATENTS = "latents, block 16, top 64, one selection for 4"
SPARSE: list[tuple[str, dict[str, Any]]] = [
    ("cuDNN, full attention, 16 key heads", {"op": "cuDNN, full", "kv_heads": 16}),
    ("FlexAttention, window 512, 16 key heads", {"op": "FlexAttention, window of 512", "kv_heads": 16}),
    ("our window of 512, 1 key head", {"op": "our window of 512", "kv_heads": 1}),
    ("fla parallel_nsa, 1 key head", {"op": "fla parallel_nsa, block 64, top 16, no window", "kv_heads": 1}),
    ("whole, block 64, top 16, 1 key head", {"op": "whole", "form": "block 64, top 16", "kv_heads": 1}),
    ("… 4 key heads", {"op": "whole", "form": "block 64, top 16", "kv_heads": 4}),
    ("whole, block 16, top 64, 1 key head", {"op": "whole", "form": "block 16, top 64", "kv_heads": 1}),
    (
        "… one selection for 4 tokens",
        {"op": "whole", "form": "block 16, top 64, one selection for 4", "kv_heads": 1},
    ),
    ("… and on latents (ASA's global layer), 1 latent", {"op": "whole", "form": _LATENTS, "kv_heads": 1}),
    ("… 4 latents", {"op": "whole", "form": _LATENTS, "kv_heads": 4}),
]


def sparse_attention() -> str:
    results = load("sparse_attention")["rows"]
    rows = []
    for label, fields in SPARSE:
        found = (find(results, section="attention", batch=B, tokens=T, **fields) for B, T in SHAPES)
        rows.append([label, *(both(row, "forward_ms", "both_ms") for row in found)])
    return markdown(["", *(f"{B} × {T if T < 10000 else f'{T:,}'}" for B, T in SHAPES)], rows)


LEARNED = [
    ("`full`", "full", "dense"),
    ("`dsa`, warm-up", "dsa", "warm-up"),
    ("`dsa`, selected", "dsa", "selected"),
    ("`lsa`, warm-up", "lsa", "warm-up"),
    ("`lsa`, selected", "lsa", "selected"),
    ("`dsa_latent`, warm-up", "dsa_latent", "warm-up"),
    ("`dsa_latent`, selected", "dsa_latent", "selected"),
    ("`lsa_latent`, warm-up", "lsa_latent", "warm-up"),
    ("`lsa_latent`, selected", "lsa_latent", "selected"),
    ("selection alone (forward)", "select", "operator"),
    ("attention to selected tokens alone", "attention", "operator"),
    ("divergence over selected tokens alone", "divergence", "operator"),
    ("divergence over all tokens alone", "divergence over all tokens", "operator"),
]


def learned_indices() -> str:
    results = [row for row in load("learned_indices")["results"] if row["backend"] is None]
    lengths = sorted({row["tokens"] for row in results})
    rows = []
    for label, op, stage in LEARNED:
        cells = [label]
        for T in lengths:
            measured = [row for row in results if (row["op"], row["stage"], row["tokens"]) == (op, stage, T)]
            if not measured:
                cells += ["", ""]
                continue
            row = find(measured)
            times = both(row, "forward_ms", "both_ms") if "both_ms" in row else ms(row["forward_ms"])
            cells += [times, f"{row['peak_mib']:.0f}"]
        rows.append(cells)
    tables = {row["tokens"]: row["table_mib"] for row in results}
    rows.append(["a T × T table in bf16", *(cell for T in lengths for cell in ("", f"{tables[T]:,.0f}"))])
    return markdown(["", *(cell for T in lengths for cell in (f"{T:,}, ms", "MiB"))], rows)


EXPERTS = [
    ("products alone", "products", True),
    ("the layer: router, permutation, balance, counts", "moe", True),
    ("… deterministic: two runs give the same bits", "deterministic", False),
    ("fixed top 12", "moe top 12", False),
    ("12 of which a third are zero-computation experts", "zero", False),
    ("dense SwiGLU of equal active FLOPs", "dense", False),
]


def experts() -> str:
    results = load("moe")["results"]
    rows = []
    for label, implementation, rate in EXPERTS:
        cells = [label]
        for shape in ("1024x64x8x512", "1024x32x8x1024"):
            row = find(results, shape=shape, implementation=implementation)
            cell = both(row, "forward_ms", "forward_backward_ms")
            cells.append(f"{cell} ({row['tflops']:.0f} TFLOP/s)" if rate else cell)
        rows.append(cells)
    return markdown(("forward / forward + backward", "64 experts of 512", "32 experts of 1,024"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "training": training,
    "delta_rule": delta_rule,
    "attention": attention,
    "sparse_attention": sparse_attention,
    "learned_indices": learned_indices,
    "experts": experts,
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)


def written(page: str) -> str:
    """The page with every table as the files have it.

    Raises:
        SystemExit: if its tables are not those of this script.
    """
    names = [name for _, name, _ in MARKED.findall(page)]
    if sorted(names) != sorted(TABLES):
        raise SystemExit(f"{PAGE.name}: got tables {names}; expected each of {list(TABLES)} once.")
    return MARKED.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table differs")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if check and after != before:
        sys.exit(f"{PAGE.name} differs from results/benchmarks: run python benchmarks/speed_tables.py.")
    if after != before:
        PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
