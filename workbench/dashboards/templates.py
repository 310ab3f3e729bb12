"""HTML from the templates in ``templates/``; every value in them is escaped unless it is ``Markup``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent / "templates"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def render(template: str, /, **values: Any) -> Markup:
    """The file ``templates/<template>`` filled with ``values``."""
    return Markup(_environment().get_template(template).render(**values))


def note(text: str) -> Markup:
    """A paragraph."""
    return Markup("<p>{}</p>").format(text)


def caption(text: str) -> Markup:
    """A paragraph in a subdued tone."""
    return Markup('<p class="caption">{}</p>').format(text)
