"""The fastest implementation of a call: measured once per device, versions and shape, and kept on disk.

Sizes count in powers of two, so that rows of many lengths are few measurements. The file is ``kernels.json`` in
``$XDG_CACHE_HOME/ablation-workbench`` (default ``~/.cache``); without it every process measures. Deterministic
algorithms, and calls that are captured in a CUDA graph, take what would be taken without peers.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.distribution import NAME
from workbench.environment import sources_hash, version
from workbench.files import locked, read_json, write_json
from workbench.ops.delta_rule.peers import Call, Peer, known_peers, obstacle
from workbench.ops.delta_rule.peers.operator import compute
from workbench.ops.delta_rule.peers.verify import inputs, measuring, refusal, results
from workbench.ops.delta_rule.torch import delta_rule_torch

WARM_UP, ROUNDS = 3, 10
"""Calls before, and calls of, a measurement."""

_chosen: dict[tuple[str, Call], str] = {}
"""Default and call, its sizes rounded -> backend. Uncompiled code asks at every call, and finds its answer here."""
_warned: set[str] = set()


def reset() -> None:
    """Forget what was chosen in this process."""
    _chosen.clear()
    _warned.clear()


@torch.compiler.assume_constant_result  # measured when code is compiled
def fastest(default: str, *call: Any) -> str:
    """The backend of the fastest peer that may be chosen, or ``default`` where none is faster.

    A peer that is not the recurrence is left out, with one warning.

    Args:
        default: the backend without peers.
        call: the fields of :class:`~workbench.ops.delta_rule.peers.Call`.
    """
    facts = Call(*call)
    if torch.are_deterministic_algorithms_enabled():
        return default
    if facts.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return default
    key = default, facts._replace(B=_rounded(facts.B), T=_rounded(facts.T))
    if key not in _chosen:
        _chosen[key] = _choose(default, facts)
    return _chosen[key]


def _choose(default: str, call: Call) -> str:
    """See :func:`fastest`. Looks for installed packages, and reads or writes the file."""
    candidates = [peer for peer in known_peers().values() if peer.automatic and obstacle(peer, call) is None]
    if not candidates:
        return default
    key = _key(default, candidates, call)
    with _kept() as kept:
        milliseconds = dict(kept.get(key, {}))
        if not milliseconds:
            milliseconds, complete = _measure(default, candidates, call)
            if complete:
                kept[key] = dict(milliseconds)
    for peer in candidates:  # what is kept was verified by another process
        reason = refusal(peer.name, *call) if peer.name in milliseconds else ""
        if reason:
            del milliseconds[peer.name]
            _warn(peer, reason)
    return min(milliseconds, key=milliseconds.__getitem__)


def _key(default: str, candidates: list[Peer], call: Call) -> str:
    """Everything that the answer depends on."""
    on_gpu = call.device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(call.device) if on_gpu else call.device.type,
        "versions": {name: version(name) for name in ("torch", "triton", *(peer.distribution for peer in candidates))},
        "kernels": _kernels(),
        "default": default,
        "peers": [peer.name for peer in candidates],
        **{name: getattr(call, name) for name in ("H", "K", "V", "decay", "erase", "packed", "compiled")},
        "dtype": str(call.dtype),
        "B": _rounded(call.B),
        "T": _rounded(call.T),
    }
    return json.dumps(facts)


@cache
def _kernels() -> str:
    """Hash of our implementations."""
    return sources_hash(Path(__file__).parents[1])


def _rounded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _measure(default: str, candidates: list[Peer], call: Call) -> tuple[dict[str, float], bool]:
    """Backend -> milliseconds, forward and backward, and whether all candidates could be measured."""
    functions: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {default: _without_peers(default)}
    for peer in candidates:
        reason = refusal(peer.name, *call)
        if reason:
            _warn(peer, reason)
        else:
            functions[peer.name] = partial(compute, peer.name, compiled=call.compiled)
    milliseconds: dict[str, float] = {}
    if len(functions) == 1:
        return {default: 0.0}, False
    for name, function in functions.items():
        try:
            milliseconds[name] = _milliseconds(function, call)
        except Exception as error:  # of the package; or too little memory beside the model
            if name == default:
                break
            _warn(known_peers()[name], f"it cannot be measured: {type(error).__name__}: {error}")
    return milliseconds or {default: 0.0}, len(milliseconds) == 1 + len(candidates)


def _without_peers(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if name == "torch":
        return delta_rule_torch
    from workbench.ops.delta_rule.kernels import delta_rule_triton  # needs Triton

    return delta_rule_triton


def _milliseconds(function: Callable[..., tuple[Tensor, Tensor]], call: Call) -> float:
    """Median of forward and backward at the sizes of the call."""
    on_gpu = call.device.type == "cuda"
    times = []
    try:
        with measuring(call.device):
            leaves, segments = inputs(call, 1.0, state=False)
            for number in range(WARM_UP + ROUNDS):
                if on_gpu:
                    torch.cuda.synchronize(call.device)
                start = time.perf_counter()
                results(function, leaves, segments)
                if on_gpu:
                    torch.cuda.synchronize(call.device)
                if number >= WARM_UP:
                    times.append(1e3 * (time.perf_counter() - start))
    finally:
        if on_gpu:
            leaves, segments = {}, None
            torch.cuda.empty_cache()
    return statistics.median(times)


def _warn(peer: Peer, reason: str) -> None:
    if peer.name not in _warned:
        _warned.add(peer.name)
        warnings.warn(f"delta_rule: {peer.name} is left out of backend='auto': {reason}", stacklevel=2)


@contextmanager
def _kept() -> Iterator[dict[str, Any]]:
    """What is on disk, locked, so that processes of one machine measure once; changes are written. Where that is
    impossible, an empty mapping."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / NAME / "kernels.json"
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_suffix(".lock")))
        except (OSError, RuntimeError):  # of a home that cannot be written, or is unknown
            yield {}
            return
        kept = read_json(path)
        before = dict(kept)
        yield kept
        if kept != before:
            with suppress(OSError):
                write_json(path, kept)
