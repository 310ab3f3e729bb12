"""Every ablation with its question, verdict and reason; edits notes, tags and display names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workbench.config import ConfigError, require
from workbench.dashboards.panel import Block, Panel, PanelConfig, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.templates import note, render
from workbench.dashboards.view import RunView
from workbench.formatting import UNKNOWN

if TYPE_CHECKING:
    from workbench.ablation.analysis.journal import Entry

ARCHIVES = "archives"
"""Folder below the folder of results into which *Archive* writes."""


@panels.register
class Journal(Panel):
    """What was asked, what came out, and why? Negative results included."""

    class Config(PanelConfig):
        kind: Literal["journal"] = "journal"
        ablation: str = Field(UNKNOWN, title="ablation")
        """What is edited, archived or deleted."""
        note: str = Field("", title="note")
        """A note that *Save* adds."""
        tags: str = Field("", title="tags")
        """Its tags, separated by commas."""
        names: str = Field("", title="names")
        """Display names of its arms: gdn = GDN hybrid, full = softmax."""
        confirm: str = Field("", title="name, to delete")
        """Type the name of the ablation here before *Delete*."""

    settings: Config
    title = "Journal"
    order = 1
    actions = {
        "Save": "Add the note, and replace tags and display names of arms",
        "Archive": f"Write what is worth keeping of a finished ablation to {ARCHIVES}/ in the folder of results",
        "Delete": "Delete the ablation with its runs and checkpoints; the ledger keeps its lines",
    }

    def applies(self, run: RunView) -> bool:
        return run.launched or not run.arms

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        return {"ablation": [UNKNOWN, *(folder.name for folder in run.neighbours.folders())]}

    def follow(self, settings: Any, field: str, run: Snapshot) -> Any:
        if field != "ablation" or settings.ablation in ("", UNKNOWN):
            return settings
        opened = _open(run, settings.ablation)
        names = ", ".join(f"{arm} = {name}" for arm, name in opened.names.items() if name != arm)
        return settings.changed(tags=", ".join(opened.notes().tags), names=names, note="", confirm="")

    def act(self, label: str, run: Snapshot) -> str:
        name = self.settings.ablation
        opened = _open(run, name)
        if label == "Save":
            return self._save(opened)
        if label == "Archive":
            from workbench.ablation.analysis.archive import archive

            return f"Wrote {archive(opened, run.results / ARCHIVES / name)}."
        confirmed = self.settings.confirm.strip() == name
        do = "Nothing was deleted."
        require(confirmed, "name, to delete", got=self.settings.confirm or "nothing", expected=name, do=do)
        opened.delete()
        self.settings = self.settings.changed(ablation=UNKNOWN, confirm="", note="", tags="", names="")
        return f"Deleted {name}."

    def _save(self, opened: Any) -> str:
        named = [part.partition("=") for part in self.settings.names.split(",") if part.strip()]
        for arm, equals, _ in named:
            require(equals, "names", got=arm.strip(), expected="arm = name, separated by commas")
        names = {arm: "" for arm in opened.arms} | {arm.strip(): text.strip() for arm, _, text in named}
        opened.rename(names)
        tags = [tag.strip() for tag in self.settings.tags.split(",") if tag.strip()]
        opened.annotate(self.settings.note, tags, [tag for tag in opened.notes().tags if tag not in tags])
        self.settings = self.settings.changed(note="")
        return f"Saved notes, tags and names of {opened.folder.name}."

    def blocks(self, run: Snapshot) -> list[Block]:
        entries = entries_of(run)
        if not entries:
            return [Text("journal", note(f"No ablation in {run.results}."))]
        return [Text("journal", render("journal.html", entries=entries))]


def _open(run: Snapshot, name: str) -> Any:
    """The ablation ``name`` of the folder of results: a page may ask for any folder."""
    from workbench.ablation.run import AblationRun

    folder = run.results / name
    if name in ("", UNKNOWN) or folder not in run.neighbours.folders():
        raise ConfigError.at("ablation", got=name, expected=f"an ablation in {run.results}")
    return AblationRun(folder)


def entries_of(run: Snapshot) -> list[Entry | tuple[str, str]]:
    """The ablations in the folder of results, the newest first; of one that cannot be read its name and the reason."""
    from workbench.ablation.analysis.journal import entry_of
    from workbench.ablation.run import AblationRun

    read: list[Entry] = []
    broken: list[tuple[str, str]] = []
    for folder in run.neighbours.folders():
        try:
            read.append(entry_of(AblationRun(folder), run.neighbours.snapshot(folder).verdict()))
        except (ConfigError, KeyError, OSError, TypeError) as error:  # of an earlier version, or deleted this moment
            broken.append((folder.name, str(error)))
    return [*sorted(read, key=lambda entry: entry.created, reverse=True), *broken]
