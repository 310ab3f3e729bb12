"""Commands that change or sum up launched ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from workbench.api import lifecycle as api
from workbench.api.answers import Extension, Journal, NotesAnswer, Removed
from workbench.cli.ablations import work_through
from workbench.cli.output import Folder, console, note, print_line


def extend(
    folder: Folder,
    seeds: Annotated[str, typer.Option(help="How many to add (+3), or which (100,101).")],
    why: Annotated[str | None, typer.Option(help="The reason; the verdict quotes it.")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: as launched.")] = None,
    detach: Annotated[bool, typer.Option(help="Start the workers and return at once.")] = False,
) -> Extension:
    """Add confirmation seeds to a finished ablation and run them.

    An anytime-valid design may be extended. In a fixed one it is a deviation: the verdict is exploratory and quotes the
    reason.
    """
    from workbench.ablation.run import AblationRun

    added = api.extend(folder, _seeds(seeds), why)
    print_line(f"Seeds {', '.join(map(str, added.seeds))} added to {folder}.")
    if not added.planned:
        note("The declared design does not have them: the verdict is exploratory from now on.")
    launched = AblationRun(folder)
    count = launched.record.workers if workers is None else workers
    return added.model_copy(update={"launch": work_through(launched, count, detach)})


def _seeds(text: str) -> int | list[int]:
    from workbench.config import ConfigError

    try:
        return int(text) if text.startswith("+") else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError.at("--seeds", got=text, expected="a number to add (+3), or seeds (100,101)") from None


def rename(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="ARM=NAME, the name under which it is shown; ARM= removes it.")],
) -> NotesAnswer:
    """Give arms display names. What is hashed, the arm's own name, stays."""
    from workbench.config import require

    pairs = [text.partition("=") for text in names]
    for text, (_, equals, _) in zip(names, pairs, strict=True):
        require(equals, "names", got=text, expected="ARM=NAME")
    return _print_notes(api.rename(folder, {arm: name for arm, _, name in pairs}))


def annotate(
    folder: Folder,
    text: Annotated[str, typer.Argument(help="A note.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag to add.")] = None,
    untag: Annotated[list[str] | None, typer.Option(help="A tag to remove.")] = None,
) -> NotesAnswer:
    """Add a note or tags to an ablation; without them, print what there is."""
    return _print_notes(api.annotate(folder, text, tag or (), untag or ()))


def _print_notes(found: NotesAnswer) -> NotesAnswer:
    for arm, name in found.names.items():
        if name != arm:
            print_line(f"{arm}: shown as {name}")
    if found.tags:
        print_line(f"tags: {', '.join(found.tags)}")
    for entry in found.notes:
        print_line(f"{entry['at']}: {entry['text']}")
    return found


def rm(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> Removed:
    """Delete an ablation with its runs and checkpoints; refused while workers are alive. The ledger keeps its lines."""
    from workbench.ablation.run import AblationRun
    from workbench.config import require

    count = 0 if api.is_refused_launch(folder) else len(AblationRun(folder).runs())
    is_sure = yes or (console.is_terminal and typer.confirm(f"Delete {folder} with {count} runs?"))
    require(is_sure, "--yes", got="no confirmation", expected="--yes, or an answer", do="Nothing was deleted.")
    removed = api.remove(folder)
    print_line(f"Deleted {removed.folder} ({removed.runs} runs).")
    for where in removed.kept:
        print_line(f"Kept: {where}")
    return removed


def journal(
    results: Annotated[Path, typer.Argument(help="Folder of all results, or of archives.")] = Path("results"),
) -> Journal:
    """Write JOURNAL.md: the question, the verdict and a line of why of every ablation, negative results included."""
    written = api.journal(results)
    print_line(f"{written.path}  ({written.ablations} ablations)")
    return written
