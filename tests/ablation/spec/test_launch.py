"""How the work is carried out, as declared: storage addresses and launchers."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.ablation.spec.launch import Launch
from workbench.config import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": "mysql://host/db"}, "postgresql://user"),
        ({"storage": "postgresql://me:secret@host/db"}, "password"),
        ({"launcher": "slurm"}, "one machine only"),
        ({"launcher": "slrum"}, "Nearest valid name: 'slurm'"),
        ({"launcher": {"kind": "local", "parameters": {"a": 1}}}, "unknown field 'parameters'"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Launch.parse(fields)


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as raised:
        Launch(storage="postgresql://me:secret@host/db")
    assert "secret" not in str(raised.value)


def test_workers_are_local_processes_by_default() -> None:
    assert Launch().launcher.kind == "local"


def test_a_launcher_with_settings_is_a_mapping() -> None:
    launch = Launch.parse({"launcher": {"kind": "slurm", "cluster": "local", "parameters": {"timeout_min": 10}}})
    assert Launch.parse(launch.plain()) == launch
