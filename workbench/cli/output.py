"""What commands share: their common arguments, the console, and answers as JSON."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from workbench.api.answers import INTERRUPTED, Answer, Done, Error, Written, document, error_document
from workbench.formatting import wrapped

if TYPE_CHECKING:
    from typing_extensions import Buffer

console = Console(markup=False)
"""Text is printed as it is: a path may contain brackets."""

File = Annotated[Path, typer.Argument(help="Ablation as YAML, such as sweeps/quickstart.yaml, or the folder of one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Fields to change: base.model.width=256.")]
Results = Annotated[Path, typer.Option(help="Folder of all results.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a launched ablation, such as results/quickstart.")]

Notify = Annotated[
    list[str] | None,
    typer.Option(help="At the end, and at the first failure: desktop, command:'COMMAND' or https://…; repeatable."),
]


class _Lossy(io.FileIO):
    """A descriptor that drops what it cannot write."""

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Prepare standard output and error: closed ones (`>&-`) are nowhere, and characters that a terminal lacks are
    replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def unattended(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that does its work whether or not its output can be written: a reader that has gone (`| head`), a
    closed terminal or a full disk behind a redirection ends nothing.

    A command without this decorator is there for its output, and ends with it.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
                raw = _Lossy(stream.fileno(), "w", closefd=False)
                encoding = stream.encoding
                lossy = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="replace", line_buffering=True)
                setattr(sys, name, lossy)
        return command(*arguments, **options)

    return run


ANSWERS: dict[str, type[Answer]] = {}
"""Command -> its answer, of every command of the program."""


def _name(command: Callable[..., Any]) -> str:
    return str(command.__name__).replace("_", "-")


class Failure(typer.Exit):
    """The end of a command without an answer, after it has printed why.

    Args:
        error: what is written with ``--json``; its kind decides the exit code.
    """

    def __init__(self, error: Error):
        super().__init__(error.exit_code)
        self.error = error


def answering(command: Callable[..., Answer | None], silent: bool = True) -> Callable[..., None]:
    """A command with the option ``--json``, which ends with the exit code of its answer.

    With ``--json`` the answer, or the error, is one JSON object on standard output, and what the command prints for
    people is dropped. A command without an answer (another rank of a run) writes nothing.

    Args:
        command: returns its answer.
        silent: whether standard output is for people; not of a server that speaks over it.
    """

    @functools.wraps(command)
    def run(*arguments: Any, as_json: bool = False, **options: Any) -> None:
        if not as_json:
            answer = command(*arguments, **options)
        else:
            with reported_errors(), _silent() if silent else contextlib.nullcontext():
                answer = command(*arguments, **options) or (Done() if kind is NoneType else None)
            if answer is not None:
                typer.echo(document(_name(command), answer))
        if answer is not None and answer.exit_code:
            raise typer.Exit(answer.exit_code)

    kind = get_type_hints(command)["return"]
    ANSWERS[_name(command)] = next((part for part in get_args(kind) or (kind,) if part is not NoneType), Done)
    option = Annotated[bool, typer.Option("--json", help="One JSON object on standard output (`workbench schema`).")]
    signature = inspect.signature(command, eval_str=True)
    last = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), last], return_annotation=None
    )
    run.__annotations__ = {**command.__annotations__, "as_json": option, "return": None}
    return run


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Write an error inside as one JSON object to standard output, and end with its exit code."""
    from workbench.config import ConfigError
    from workbench.files import MACHINE

    try:
        yield
    except Failure as failure:
        error = failure.error
    except ConfigError as mistake:
        error = Error.of(mistake)
    except KeyboardInterrupt:
        error = Error(kind="interrupted", message="Interrupted.")
    except OSError as problem:
        error = Error.of_machine(problem) if problem.errno in MACHINE else _internal(problem)
    except typer.Exit as ended:
        if not ended.exit_code:
            raise
        kind: Literal["interrupted", "unfinished"] = "interrupted" if ended.exit_code == INTERRUPTED else "unfinished"
        error = Error(kind=kind, message=f"The command ended with exit code {ended.exit_code}.")
    except Exception as problem:
        error = _internal(problem)
    else:
        return
    typer.echo(error_document(error))
    raise typer.Exit(error.exit_code)


def _internal(problem: Exception) -> Error:
    traceback.print_exception(problem, file=sys.stderr)
    return Error(kind="internal", message=f"{type(problem).__name__}: {problem}")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop standard output, that of child processes and other libraries included."""
    stream = sys.stdout
    stream.flush()
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a test captures the output
        descriptor = -1
    saved = os.dup(descriptor) if descriptor == 1 else -1
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            if saved >= 0:
                os.dup2(nowhere.fileno(), descriptor)
            yield
    finally:
        if saved >= 0:
            stream.flush()
            os.dup2(saved, descriptor)
            os.close(saved)


def written(path: Path, fingerprint: str | None = None) -> Written:
    """Print the path of what was written; the answer."""
    console.print(str(path) if fingerprint is None else f"{path}  ({fingerprint})", soft_wrap=True)
    return Written(path=str(Path(path).absolute()), fingerprint=fingerprint)


def parse_numbers(name: str, text: str) -> list[int]:
    """Whole numbers, separated by commas or spaces.

    Raises:
        ConfigError: for anything else, naming the option.
    """
    from workbench.config import ConfigError

    try:
        return [int(number) for number in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError.at(name, got=text, expected="whole numbers, such as '1024 4096'") from None


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], repeated: int = 1) -> None:
    """Print rows. Columns for which the terminal has no room follow in further tables, each of which begins with the
    first ``repeated`` columns."""
    body = [tuple(row) for row in rows]
    # titles wrap at words
    words = [max(map(cell_len, title.split()), default=0) for title in titles]
    widths = [max([words[i], *(cell_len(row[i]) for row in body)]) + 3 for i in range(len(titles))]
    room = console.width - 1 - min(sum(widths[:repeated]), console.width // 2)
    parts: list[list[int]] = [[]]
    for number in range(repeated, len(titles)):
        if parts[-1] and sum(widths[other] for other in (*parts[-1], number)) > room:
            parts.append([])
        parts[-1].append(number)
    for part in parts:
        shown = (*range(repeated), *part)
        least = [1 if number < repeated else min(widths[number] - 3, room) for number in shown]
        table = Table(*(Column(titles[number], min_width=width) for number, width in zip(shown, least)))
        for row in body:
            table.add_row(*(row[number] for number in shown))
        console.print(table)


def print_line(line: str) -> None:
    """Print without markup or wrapping."""
    typer.echo(line)


def print_text(text: str) -> None:
    """Print sentences wrapped at words: to the width of the terminal, or to 100 columns where there is none."""
    print_line(wrapped(text, console.width if console.is_terminal else 100))


def note(line: str) -> None:
    """Print a line about a step, or a whole sentence."""
    typer.secho(line if line.endswith(".") else f"{line} …", dim=True)
