"""Draw the pictures of docs/notebooks.md from executed notebooks.

usage: python tools/notebook_pictures.py FOLDER     # jupyter nbconvert --execute --to notebook --output-dir FOLDER …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat
import plotly.io

DOCS = Path(__file__).resolve().parents[1] / "docs"
CELLS = {
    "01": "reads",
    "02": "overwrite",
    "03": "moe-04",
    "05": "cell-3",
    "07": "coordinates",
    "08": "muon",
    "09": "map",
}
"""Number of a notebook -> the cell whose figure is drawn."""
FIGURE = "application/vnd.plotly.v1+json"


def main() -> None:
    for number, cell in CELLS.items():
        for path in Path(sys.argv[1]).glob(f"{number}*.ipynb"):
            notebook = nbformat.read(path, as_version=4)
            (outputs,) = (each.outputs for each in notebook.cells if each.get("id") == cell)
            (data,) = (output.data[FIGURE] for output in outputs if FIGURE in output.get("data", {}))
            figure = plotly.io.from_json(json.dumps(data), skip_invalid=True)
            target = DOCS / f"notebook_{number}.png"
            figure.update_layout(paper_bgcolor="white", plot_bgcolor="white")
            target.write_bytes(figure.to_image("png", width=900, height=figure.layout.height or 360, scale=1))
            print(target)


if __name__ == "__main__":
    main()
