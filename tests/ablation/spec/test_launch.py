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
        ({"storage": "postgresql://host/db?password=secret"}, "password"),
        ({"storage": "postgresql://host/db?sslmode=require&password=secret"}, "password"),
        ({"storage": "postgresql://me:se/cret@host/db"}, "password"),
        ({"storage": "postgres://me:secret@host/db"}, "postgresql://user"),
        ({"storage": "postgresql://me@host:many/db"}, "postgresql://user"),
        ({"workers": 2000}, "1024"),
        ({"launcher": "slurm"}, "one machine only"),
        ({"launcher": "ray"}, "one machine only"),
        ({"launcher": "slrum"}, "Nearest valid name: 'slurm'"),
        ({"launcher": {"kind": "local", "parameters": {"a": 1}}}, "unknown field 'parameters'"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Launch.parse(fields)


@pytest.mark.parametrize(
    "address", ["postgresql://me:secret@h/db", "postgres://me:secret@h/d", "postgresql://h/d?password=secret"]
)
def test_a_password_is_not_repeated(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Launch(storage=address)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    ["postgresql://me@host/db", "postgresql+psycopg://host:5432/db", "postgresql:///db?host=/run/pg&sslmode=require"],
)
def test_addresses_without_a_password_are_accepted(address: str) -> None:
    assert Launch(storage=address).storage == address


@pytest.mark.parametrize(
    "parameters",
    [
        {"slurm_setup": ["touch x"]},
        {"local_setup": ["touch x"]},
        {"slurm_python": "/tmp/python"},
        {"slurm_srun_args": ["--x"]},
        {"slurm_additional_parameters": {"comment": "x"}},
        {"slurm_comment": "x\ntouch y"},
        {"slurm_comment": "$(touch y)"},
    ],
)
def test_a_job_parameter_that_could_run_a_command_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"launcher.parameters"):
        Launch.parse({"launcher": {"kind": "slurm", "cluster": "local", "parameters": parameters}})


def test_a_ray_cluster_of_one_host_needs_no_database_server() -> None:
    assert Launch.parse({"launcher": {"kind": "ray", "one_host": True}}).storage is None


def test_a_job_of_ray_takes_resources_only() -> None:
    launcher = {"kind": "ray", "parameters": {"runtime_env": {"pip": ["x"]}}}
    with pytest.raises(ConfigError, match=r"launcher.parameters"):
        Launch.parse({"launcher": launcher, "storage": "postgresql://h/d"})


def test_workers_are_local_processes_by_default() -> None:
    assert Launch().launcher.kind == "local"


def test_a_launcher_with_settings_is_a_mapping() -> None:
    launch = Launch.parse({"launcher": {"kind": "slurm", "cluster": "local", "parameters": {"timeout_min": 10}}})
    assert Launch.parse(launch.plain()) == launch
