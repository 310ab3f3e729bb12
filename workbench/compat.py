"""Private parts of other libraries that the workbench relies on, each with the reason and a test in
tests/test_compat.py.

Nothing outside this module uses a private name of another library. An update that moves one of them fails here, by
name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic._internal._model_construction import ModelMetaclass

if TYPE_CHECKING:
    import ipywidgets
    import optuna
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

__all__ = [
    "ModelMetaclass",
    "TorchDispatchMode",
    "answer_beside_cells",
    "autograd_inside_operators",
    "is_taken_over",
    "lost_storage",
    "storage_key",
    "tree_leaves",
    "trial_id",
    "trials_with_heartbeat",
]


def __getattr__(name: str) -> Any:
    """Parts of torch, imported on first use: this module itself must not import torch.

    ``TorchDispatchMode`` sees every operation of a training step, backward included; ``tree_leaves`` lists the tensors
    in its arguments. Torch documents both, in private modules.
    """
    if name == "TorchDispatchMode":
        from torch.utils._python_dispatch import TorchDispatchMode

        return TorchDispatchMode
    if name == "tree_leaves":
        from torch.utils._pytree import tree_leaves

        return tree_leaves
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ModelMetaclass: `Config` translates pydantic's ValidationError into ConfigError on direct construction; only a
# metaclass sees the call, and pydantic does not export its own.


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage while it exists.

    On the meta device every ``data_ptr`` is 0, so nothing public tells two storages apart.
    """
    return int(storage._cdata)


@contextmanager
def autograd_inside_operators() -> Iterator[None]:
    """Record gradients inside a ``torch.library.custom_op``, where the dispatcher leaves autograd out.

    A backward pass that repeats a forward pass of another package needs it; torch documents the guard nowhere.
    """
    import torch

    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def trial_id(trial: optuna.trial.FrozenTrial) -> int:
    """The key of a trial in Optuna's database; the public ``number`` counts within one study only."""
    return int(trial._trial_id)


def trials_with_heartbeat(storage: optuna.storages.RDBStorage) -> set[int]:
    """Keys (:func:`trial_id`) of trials whose worker has recorded a heartbeat.

    Optuna looks for heartbeats that have grown old. A trial whose worker was killed before its first heartbeat has
    none, and would stay running for ever; that there is none can be read from the table only.
    """
    from sqlalchemy import text

    with storage.engine.connect() as connection:
        return {key for (key,) in connection.execute(text("SELECT trial_id FROM trial_heartbeats"))}


def is_taken_over(error: BaseException) -> bool:
    """Whether ``study.optimize`` failed because its trial was given to another worker meanwhile.

    Optuna has three ways to say so: ``UpdateFinishedTrialError`` from the storage; a plain ``ValueError`` from
    ``study.tell``, known by its text alone; and, if the objective had returned a value, an ``AssertionError`` raised
    while it handles that one.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    if isinstance(error, AssertionError) and error.__context__ is not None:
        return is_taken_over(error.__context__)
    return isinstance(error, UpdateFinishedTrialError) or (
        isinstance(error, ValueError) and str(error).startswith("Cannot tell a ")
    )


def lost_storage(error: BaseException | None) -> BaseException | None:
    """The error of a database that did not answer, however it is wrapped; None if ``error`` is another one.

    When a connection breaks while a trial ends, Optuna raises an ``UnboundLocalError`` of its own while it handles
    ``StorageInternalError``; a query outside its sessions raises SQLAlchemy's error as it is.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError

    while error is not None:
        if isinstance(error, StorageInternalError | DBAPIError):
            return error
        error = error.__cause__ or error.__context__
    return None


def answer_beside_cells(widget: ipywidgets.Widget) -> None:
    """Let the kernel take messages to a widget, and to all below it, on the subshell that the front end names.

    A front end sends messages of widgets to a subshell, a thread beside the one in which cells run. ipykernel moves
    them to the thread that has last sent something on the widget's channel, which for a widget made in a cell is the
    cells' own: a click waits for the cell that runs. Only for widgets whose handlers take locks.
    """
    comm = getattr(widget, "comm", None)
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default  # type: ignore[union-attr]
    for child in getattr(widget, "children", ()):
        answer_beside_cells(child)
