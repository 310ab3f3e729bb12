"""Coordinate check of every parametrisation: over widths for full, gdn, mla and full with moe, over depths for full.

    python benchmarks/coordinates.py --html coordinates.html

Prints the slopes of docs/transfer.md and draws the change of the last hidden states over the width. Results go to
results/benchmarks/coordinates.json.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import plotly.express as px
import polars as pl
import typer
from common import ROOT, write_report

sys.path.insert(0, str(ROOT))
from workbench.dashboards import style
from workbench.training.config import RunConfig
from workbench.training.coordinates import coordinate_check

WIDTHS, DEPTHS = (32, 64, 128, 256), (4, 8, 16)
KINDS = ("standard", "full_align", "mup", "complete_p")
STEPS, SEEDS = 5, (0, 1)
MODELS: dict[str, dict[str, Any]] = {
    "full": {"pattern": "full"},
    "gdn": {"pattern": "gdn"},
    "mla": {"pattern": "mla"},
    "full with moe": {"pattern": "full", "feedforward": "moe", "feedforwards": {"moe": {"experts": 4}}},
}


def run_config(model: str, kind: str, base: dict[str, int], **settings: Any) -> RunConfig:
    fields = MODELS[model]
    size = {"depth": 2, "vocabulary": 128, "tied": False, "mixers": {fields["pattern"]: {"head_dim": 16}}, **base}
    rules = {} if kind == "standard" else {"parametrisation": {"kind": kind, "base": base, **settings}}
    return RunConfig.parse({"model": {**size, **fields, **rules}, "training": {"learning_rate": 3e-3}})


def main(
    html: Annotated[Path | None, typer.Option(help="Write the figure to this file.")] = None,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = ROOT / "results/benchmarks/coordinates.json",
) -> None:
    """Slopes of every model and parametrisation, and a figure."""
    started = time.perf_counter()
    over: Literal["width", "depth"]
    cases: list[tuple[str, str, Literal["width", "depth"], RunConfig]] = [
        (model, kind, "width", run_config(model, kind, {"width": WIDTHS[0]})) for model in MODELS for kind in KINDS
    ]
    for kind in ("mup", "complete_p"):
        for multiplier in (1.0, 16.0):
            base = {"width": 64, "depth": DEPTHS[0]}
            config = run_config("full", kind, base, input_multiplier=multiplier)
            cases.append((f"full, input_multiplier {multiplier:g}", kind, "depth", config))
    slopes, tables = [], []
    for model, kind, over, config in cases:
        sizes = WIDTHS if over == "width" else DEPTHS
        check = coordinate_check(config, sizes, over, steps=STEPS, seeds=SEEDS)
        decisive = check.slopes().filter(pl.col("flat").is_not_null())
        for row in decisive.iter_rows(named=True):
            slopes.append({"model": model, "kind": kind, "over": over, **row})
            print(f"{model}, {kind}, {over}: {row['quantity']} {row['slope']:+.2f} (bound {row['bound']})", flush=True)
        last = check.table.filter((pl.col("step") == STEPS) & (pl.col("quantity") == "hidden change"))
        size = last.group_by(pl.col(over).alias("size"), maintain_order=True).agg(pl.col("value").mean())
        tables.append(size.with_columns(model=pl.lit(model), parametrisation=pl.lit(kind), over=pl.lit(over)))
    write_report(out, {"steps": STEPS, "seeds": SEEDS, "slopes": slopes}, started)
    if html is not None:
        figure = px.line(
            pl.concat(tables).filter(pl.col("over") == "width"),
            x="size",
            y="value",
            color="parametrisation",
            facet_col="model",
            markers=True,
            log_x=True,
            log_y=True,
            labels={"size": "width", "value": "mean absolute change"},
            template=style.TEMPLATE,
            height=380,
        )
        figure.for_each_annotation(lambda title: title.update(text=title.text.split("=")[-1]))
        figure.update_layout(**style.ABOVE_TITLES)
        figure.write_html(html, config={"displayModeBar": False})


if __name__ == "__main__":
    typer.run(main)
