"""Pages of the documentation site that are made from other files: a hook of MkDocs (``mkdocs.yml``).

The home page is README.md; contributing and changelog are the files of these names. The gallery is made from
``sweeps/*.yaml`` and ``results/ablations/``, the page of all variants from the registries, the reference from the
docstrings of the package, read without importing it. Links between files of the repository become links between pages;
a linked file that is no page is copied into the site.
"""

from __future__ import annotations

import ast
import html
import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import plotly.offline
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from ruamel.yaml import YAML

import workbench as wb
from workbench.ablation.spec.launch import launchers
from workbench.api.results import described
from workbench.contract import embeddings, feedforwards, mixers, residuals
from workbench.dashboards import figure
from workbench.data import sources
from workbench.data.batching import batch_plans
from workbench.data.corpora import corpora
from workbench.data.loads import load_models
from workbench.decoding.policy import policies
from workbench.evaluation.suites import suites
from workbench.guards import guards
from workbench.notifiers import notifiers
from workbench.optimisers import optimisers
from workbench.parametrisations import parametrisations
from workbench.training.budgets import budget_tuners
from workbench.transforms import transforms

ROOT = Path(__file__).resolve().parents[1]
ARCHIVES, SWEEPS = ROOT / "results" / "ablations", ROOT / "sweeps"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files outside docs/ -> their pages."""
PLOTLY = "assets/plotly.min.js"
ALONE = "---\nhide: [navigation]\n---\n\n"
"""Begins a page that has no others beside it in the navigation."""

REFERENCE = {
    "Python interface": (
        "workbench.ablation.ablation",
        "workbench.ablation.run",
        "workbench.dashboards.panel",
        "workbench.dashboards.view",
        "workbench.dashboards.export",
        "workbench.paper",
    ),
    "Fields of an ablation": ("workbench.ablation.spec.*",),
    "Fields of a run": (
        "workbench.training.config",
        "workbench.model.config",
        "workbench.data.config",
        "workbench.data.sources",
    ),
    "Verdict and analysis": (
        "workbench.ablation.verdict.verdict",
        "workbench.ablation.verdict.summary",
        "workbench.ablation.analysis.*",
    ),
    "Answers as data": ("workbench.api.*",),
    "Contract of an extension": ("workbench.contract", "workbench.registry", "workbench.config", "workbench.metric"),
    "Conformance suites": ("workbench.testing.*",),
    "Mixers": ("workbench.mixers.*",),
    "Feed-forwards and embeddings": ("workbench.feedforwards.*", "workbench.embeddings.*", "workbench.residuals.*"),
    "Optimisers, guards, parametrisations": (
        "workbench.optimisers.*",
        "workbench.guards.*",
        "workbench.parametrisations.*",
    ),
    "Weight transforms": ("workbench.transforms.*",),
    "Tasks and corpora": ("workbench.data.tasks.*", "workbench.data.corpora.*"),
    "Evaluation suites": ("workbench.evaluation.suites.*",),
    "Decoding policies": ("workbench.decoding.policies.*",),
    "Launchers": ("workbench.ablation.execution.launchers.*",),
}
"""Title of a page of the reference -> modules; ``package.*`` is every module of a package."""


# -- hooks -----------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the reference in the navigation."""
    config.nav.append({"Reference": [{title: reference_page(title)} for title in REFERENCE]})  # type: ignore[union-attr]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files that pages link to."""
    generated = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    generated["index.md"] = ALONE + generated["index.md"]
    generated |= {reference_page(title): reference(title) for title in REFERENCE}
    generated["gallery/index.md"] = ALONE + gallery()
    generated["variants.md"] = variants()
    generated |= {f"gallery/{path.name}.md": ALONE + archived(path) for path in archives()}
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, PLOTLY, content=plotly.offline.get_plotlyjs()))
    sources = {**{name: ROOT / name for name in PAGES}, **{f"docs/{p.name}": p for p in ROOT.glob("docs/*.md")}}
    linked = {target for name, path in sources.items() for target in links(name, path.read_text(encoding="utf-8"))}
    for target in sorted(linked):
        if page_of(target) is None and (ROOT / target).is_file():
            files.append(File.generated(config, f"files/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at pages and at copied files."""
    source = next((name for name, made in PAGES.items() if made == page.file.src_uri), f"docs/{page.file.src_uri}")
    folder = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target, anchor = target_of(source, match[2]), match[3] or ""
        if target is None:
            return match[0]
        made = page_of(target) or f"files/{target}"
        return f"{match[1]}{posixpath.relpath(made, folder or '.')}{anchor})"

    return LINK.sub(moved, markdown) if not page.file.src_uri.startswith(("gallery/", "reference/")) else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Drop the roles of reStructuredText that docstrings write before names."""
    role = ":(?:attr|class|data|func|meth|mod):"
    return re.sub(f"{role}(?=<code>)", "", re.sub(f"{role}`([^`<]+)`", r"\1", content))


# -- links -----------------------------------------------------------------------------------------------------------

LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def target_of(source: str, link: str) -> str | None:
    """The file that a link means, relative to the root of the repository; None if there is no such file."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return target if (ROOT / target).exists() else None


def links(source: str, text: str) -> Iterator[str]:
    """Files and folders of the repository that a page links to."""
    for match in LINK.finditer(text):
        if target := target_of(source, match[2]):
            yield target


def page_of(target: str) -> str | None:
    """The page of a file of the repository, or the picture inside docs/; None if it is neither."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.startswith("results/ablations"):
        name = (*Path(target).parts, "")[2]
        return f"gallery/{name}.md" if name and (ARCHIVES / name).is_dir() else "gallery/index.md"
    return None


# -- gallery ---------------------------------------------------------------------------------------------------------


def archives() -> list[Path]:
    return sorted(path.parent for path in ARCHIVES.glob("*/ablation.json"))


@cache
def opened(path: Path) -> Any:
    return wb.open(path)


def gallery() -> str:
    """One table of what was measured, one of what is only declared."""
    lines = [
        "# Gallery",
        "",
        f"{len(archives())} finished ablations from `results/ablations/`: what was asked and what came out.",
        "A verdict holds for the settings, sizes and documents that it names; its page has all of them.",
        "",
        "| ablation | question | verdict |",
        "|---|---|---|",
    ]
    for path in archives():
        run = opened(path)
        headline = cell(run.summary().headline)
        lines.append(f"| [{run.folder.name}]({run.folder.name}.md) | {cell(run.question)} | {headline} |")
    lines += [
        "",
        "## Sweeps",
        "",
        "Every file of `sweeps/` runs with `workbench run`; sizes such as `_340m` need a GPU.",
        "",
    ]
    lines += ["| file | question | arms |", "|---|---|---|"]
    for path in sorted(SWEEPS.glob("*.yaml")):
        fields = YAML(typ="safe").load(path)
        if arms := fields.get("arms"):
            listed = ", ".join(f"`{arm}`" for arm in arms)
            lines.append(f"| `{path.name}` | {cell(fields.get('question') or '–')} | {listed} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").split())


def archived(path: Path) -> str:
    """The page of a finished ablation."""
    run = opened(path)
    summary, record = run.summary(), run.record
    lines = [f"# {path.name}", "", cell(run.question), "", f"**{cell(summary.headline)}**", ""]
    lines += [f"{cell(summary.caution)}\n"] if summary.caution else []
    lines += ["| arm | verdict | difference | what it is |", "|---|---|---|---|"]
    for badge in summary.badges:
        settings = record.config.arms[badge.arm]
        described = ", ".join(f"`{field}: {value!r}`" for field, value in settings.items()) or "as in `base`"
        lines.append(f"| {badge.arm} | {badge.word} | {badge.value} | {described} |")
    lines += ["", *plot(run)]
    sweep = next((file for file in SWEEPS.glob("*.yaml") if YAML(typ="safe").load(file).get("name") == run.name), None)
    command = f"workbench run results/ablations/{path.name} name={run.name}-again"
    lines += ["## Repeat it", "", "```sh", f"workbench run sweeps/{sweep.name}" if sweep else command, "```", ""]
    text = (path / "verdict.md").read_text(encoding="utf-8")
    return "\n".join([*lines, "## The verdict", "", "```text" + text.partition("```")[2]])


def plot(run: Any) -> list[str]:
    """The differences of the arms with their intervals, drawn by a script in the page."""
    drawn = figure(run, "effects")
    drawn.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", width=None)
    data = str(drawn.to_json()).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return [
        f'<div class="wb-plot" style="height:{drawn.layout.height or 360}px"></div>',
        f'<script type="application/json" class="wb-figure">{data}</script>',
        f'<script src="../{PLOTLY}"></script><script src="../assets/plots.js"></script>',
        "",
    ]


# -- variants --------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, Any] = {
    "Mixers": mixers,
    "Feed-forwards": feedforwards,
    "Embeddings": embeddings,
    "Residuals": residuals,
    "Weight transforms": transforms,
    "Optimisers": optimisers,
    "Guards": guards,
    "Parametrisations": parametrisations,
    "Data sources": sources,
    "Corpora": corpora,
    "Batch plans": batch_plans,
    "Load models": load_models,
    "Budget tuners": budget_tuners,
    "Decoding policies": policies,
    "Evaluation suites": suites,
    "Launchers": launchers,
    "Notifiers": notifiers,
}
"""Title of a section -> registry."""


def variants() -> str:
    """Every registered class: name, what it is, source, settings with defaults."""
    lines = [
        "# Variants",
        "",
        "Everything that a configuration chooses by name. `workbench variants NAME` prints what an ablation compares, "
        "plug-ins included.",
        "",
    ]
    for title, registry in VARIANTS.items():
        lines += [f"## {title}", "", "| name | what it is | paper | reference |", "|---|---|---|---|"]
        found = [(described(registry, name), registry[name]) for name in registry]
        for variant, cls in found:
            paper = f"[arXiv {variant.paper}](https://arxiv.org/abs/{variant.paper})" if variant.paper else "–"
            lines.append(f"| `{variant.name}` | {cell(variant.description)} | {paper} | {reference_link(cls)} |")
        for variant, _ in found:
            if variant.fields:
                lines += ["", f"### Settings of `{variant.name}`", "", "| field | default | |", "|---|---|---|"]
                lines += [
                    f"| `{f['name']}` | `{json.dumps(f['default'])}` | {cell(f['description'])} |"
                    for f in variant.fields
                ]
        lines.append("")
    return "\n".join(lines) + "\n"


def reference_link(cls: type) -> str:
    """A link to a class in the reference; its name where the reference does not have it."""
    for title in REFERENCE:
        if cls.__module__ in modules(title):
            return f"[`{cls.__name__}`]({reference_page(title)}#{cls.__module__}.{cls.__name__})"
    return f"`{cls.__module__}.{cls.__name__}`"


# -- reference -------------------------------------------------------------------------------------------------------


def reference_page(title: str) -> str:
    return f"reference/{re.sub(r'[^a-z]+', '-', title.lower())}.md"


def modules(title: str) -> list[str]:
    """Modules of a page, without private ones and those that have nothing public."""
    found = []
    for name in REFERENCE[title]:
        package = ROOT / name.removesuffix(".*").replace(".", "/")
        paths = sorted(package.glob("*.py")) if name.endswith(".*") else [package.with_suffix(".py")]
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_" for node in tree.body):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def reference(title: str) -> str:
    return "\n".join([f"# {title}", "", *(f"::: {module}\n" for module in modules(title))])
