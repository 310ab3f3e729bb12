"""Private parts of other libraries are where workbench.compat expects them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from pydantic import BaseModel

from workbench import compat


def test_pydantic_models_are_built_by_the_metaclass() -> None:
    assert type(BaseModel) is compat.ModelMetaclass


def test_storages_on_the_meta_device_are_told_apart() -> None:
    first, second = (torch.empty(3, device="meta") for _ in range(2))
    assert compat.storage_key(first.untyped_storage()) != compat.storage_key(second.untyped_storage())


def test_views_share_their_storage() -> None:
    tensor = torch.empty(4, device="meta")
    assert compat.storage_key(tensor.untyped_storage()) == compat.storage_key(tensor[:2].untyped_storage())


def test_gradients_can_be_recorded_inside_an_operator() -> None:
    recorded = []

    @torch.library.custom_op("workbench_tests::gradient_of_square", mutates_args=())
    def gradient_of_square(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        recorded.append((x * x).requires_grad)
        with torch.enable_grad(), compat.autograd_inside_operators():
            return torch.autograd.grad(x * x, x, torch.ones_like(x))[0]

    assert gradient_of_square(torch.tensor([3.0])).item() == 6.0
    assert recorded == [False], "torch records gradients there by itself: the guard can go"


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}", heartbeat_interval=1)
    return optuna.create_study(storage=storage)


@pytest.mark.filterwarnings("ignore")
def test_only_a_worker_at_work_records_a_heartbeat(study: optuna.Study) -> None:
    storage = study._storage._backend  # type: ignore[attr-defined]
    alive = []

    def objective(trial: optuna.Trial) -> float:
        (running,) = study.get_trials(states=(TrialState.RUNNING,))
        key, deadline = compat.trial_id(running), time.monotonic() + 60
        while key not in compat.trials_with_heartbeat(storage) and time.monotonic() < deadline:
            time.sleep(0.02)  # a thread records the heartbeat, and may start after the objective
        alive.append(key in compat.trials_with_heartbeat(storage))
        return 0.0

    study.optimize(objective, n_trials=1)
    study.ask()
    (asked,) = study.get_trials(states=(TrialState.RUNNING,))
    assert alive == [True]
    assert compat.trial_id(asked) not in compat.trials_with_heartbeat(storage)


@pytest.mark.filterwarnings("ignore")
def test_a_trial_that_has_ended_meanwhile_is_taken_over(study: optuna.Study) -> None:
    def objective(trial: optuna.Trial) -> float:
        study.tell(trial.number, state=TrialState.FAIL)
        return 0.0

    with pytest.raises(Exception) as raised:
        study.optimize(objective, n_trials=1)
    assert compat.is_taken_over(raised.value)


@pytest.mark.filterwarnings("ignore")
def test_reporting_to_a_trial_that_has_ended_is_taken_over(study: optuna.Study) -> None:
    trial = study.ask()
    study.tell(trial.number, state=TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError) as raised:
        trial.report(1.0, 1)
    assert compat.is_taken_over(raised.value)


def test_another_error_is_not_taken_over() -> None:
    assert not compat.is_taken_over(ValueError("something else"))


def test_a_dispatch_mode_sees_the_tensors_of_every_operation() -> None:
    import torch

    shapes = []

    class Record(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            shapes.extend(leaf.shape for leaf in compat.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Record():
        torch.ones(2, 3) + torch.ones(3)
    assert shapes == [(2, 3), (3,)]


def test_a_lost_database_is_found_behind_an_error_of_optuna() -> None:
    from optuna.exceptions import StorageInternalError

    def end_a_trial() -> None:
        try:
            raise StorageInternalError("down")
        except StorageInternalError:
            raise UnboundLocalError("updated_state")  # noqa: B904 as optuna.study does

    with pytest.raises(UnboundLocalError) as raised:
        end_a_trial()
    assert str(compat.lost_storage(raised.value)) == "down"


def test_another_error_is_no_lost_database() -> None:
    assert compat.lost_storage(UnboundLocalError("x")) is None


def test_a_click_goes_to_the_subshell_that_the_page_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import ipywidgets
    from ipykernel.comm.comm import BaseComm, Comm

    monkeypatch.setattr(BaseComm, "publish_msg", lambda *_, **__: None)
    button = ipywidgets.Button()
    box = ipywidgets.VBox([button])
    for widget in (box, button):
        monkeypatch.setattr(type(widget), "comm", Comm(comm_id=widget.model_id), raising=False)
        widget.comm._reply_subshell_id = None  # the cells' thread has sent last
        assert widget.comm._reply_subshell_for({}, "subshell") is None
    compat.answer_beside_cells(box)
    assert box.comm._reply_subshell_for({}, "subshell") == button.comm._reply_subshell_for({}, "subshell") == "subshell"
