"""What conformance checks measure: errors, executed FLOPs, parameters in use, tensors of a cache, attributes.

Counts are taken from what runs, never from the formulas that they check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from workbench.config import Config
from workbench.contract import Role
from workbench.model.roles import parameter_roles
from workbench.ops.delta_rule import by_blocks

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
"""Largest relative error, ‖a - b‖ / ‖b‖, by precision."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, and infinite where anything is not finite."""
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def typical_error(actual_BTD: Tensor, expected_BTD: Tensor) -> float:
    """Median over tokens of the relative error in fp64. A few tokens may differ at will, as those do that select other
    blocks or experts in another precision. Infinite where anything is not finite."""
    if not (actual_BTD.isfinite().all() and expected_BTD.isfinite().all()):
        return float("inf")
    actual, expected = actual_BTD.detach().double(), expected_BTD.detach().double()
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).median())


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError when the relative error exceeds the tolerance of the precision."""
    error, allowed = relative_error(actual, expected), TOLERANCE[expected.dtype]
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.0e}"


def check_gradients(value: Callable[[], Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise AssertionError unless the gradients of ``value()`` equal its finite differences, along a random direction
    in each of ``tensors``."""
    gradients = torch.autograd.grad(value(), list(tensors.values()), allow_unused=True)
    for (name, tensor), gradient in zip(tensors.items(), gradients):
        assert gradient is not None, f"{name} does not take part in the output"
        direction = torch.randn_like(tensor)
        direction /= direction.norm()
        with torch.no_grad():
            start, ends = tensor.clone(), []
            for sign in (1, -1):
                tensor.copy_(start + sign * 1e-5 * direction)
                ends.append(value())
            tensor.copy_(start)
        numeric = (ends[0] - ends[1]) / 2e-5
        analytic = (gradient * direction).sum()
        scale = max(1.0, float(gradient.norm()))
        assert abs(float(numeric - analytic)) < 1e-5 * scale, (
            f"{name}: {analytic:.6e}, but differences give {numeric:.6e}"
        )


def document_lengths(cuts: Sequence[int], T: int) -> list[list[int]]:
    """Lengths of the documents of rows of ``T`` tokens, a row per cut: documents end at it and three tokens later."""
    rows = [sorted({cut, min(T, cut + 3), T}) for cut in cuts]
    return [[b - a for a, b in zip([0, *ends], ends)] for ends in rows]


def document_numbers(lengths: Sequence[int], first: int = 0) -> Tensor:
    """(T,) numbers of documents of these lengths, counted from ``first``."""
    return torch.repeat_interleave(torch.arange(first, first + len(lengths)), torch.tensor(lengths))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory reads as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# -- FLOPs -----------------------------------------------------------------------------------------------------------


def _solve_triangular(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    # n²/2 entries, one multiply-add each, for every right-hand side
    return b.numel() * b.shape[-2]


def _positions(start_BT: Tensor, offset: int) -> Tensor:
    rows_T = torch.arange(offset, offset + start_BT.shape[1], device=start_BT.device)
    return rows_T - start_BT


def _visible_blocks(position: Tensor, length: int, stride: int) -> Tensor:
    """Blocks of the document that end at or before each position, one by one."""
    most = int(position.max()) // stride + 1 if position.numel() else 0
    last_N = torch.arange(max(0, most), device=position.device) * stride + length - 1
    return (last_N <= position[..., None]).sum(-1)


def _visible_block_attention(
    q: Tensor, k: Tensor, v: Any, start_BT: Tensor, value_dim: int, *sizes: Any, **_: Any
) -> int:
    offset, length, stride, window = sizes[:4]
    seen = _visible_blocks(_positions(start_BT, offset), length, stride)
    pairs = int((seen.clamp_max(window) if window else seen).sum())
    return 2 * q.shape[2] * pairs * (q.shape[3] + value_dim)


def _selected_attention(
    q: Tensor, k: Tensor, v: Any, starts_BTGn: Tensor, start_BT: Tensor, value_dim: int, *sizes: Any, **_: Any
) -> int:
    offset, block = sizes[:2]
    row_T = torch.arange(offset, offset + q.shape[1], device=q.device)
    tokens_BTGnl = starts_BTGn[..., None] + torch.arange(block, device=q.device)
    seen = (starts_BTGn[..., None] >= 0) & (tokens_BTGnl <= row_T[:, None, None, None])
    heads_per_group = q.shape[2] // starts_BTGn.shape[2]
    return 2 * heads_per_group * int(seen.sum()) * (q.shape[3] + value_dim)


def _select_blocks(
    q: Tensor, ck: Tensor, lse: Tensor, start_BQ: Tensor, rows_BQ: Tensor, num_keys: int, *sizes: Any, **_: Any
) -> int:
    length, stride = sizes[:2]
    seen = _visible_blocks(torch.where(rows_BQ >= 0, rows_BQ - start_BQ, -1), length, stride)
    return 2 * q.shape[2] * q.shape[3] * int(seen.sum())


def _select_tokens(
    q: Tensor, k: Tensor, w: Tensor, start_BT: Tensor, count: int, offset: int, *sizes: Any, **_: Any
) -> int:
    seen = _positions(start_BT, offset) + 1
    return 2 * q.shape[2] * q.shape[3] * int(seen[seen > count].sum())


def _counted(count: Callable[..., int]) -> Callable[..., int]:
    """A formula that sees the tensors themselves, and not only their shapes."""

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return count(*args, **kwargs)

    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _formulas() -> dict[Any, Callable[..., int]]:
    import workbench.ops.sparse_attention  # -- these define the operators
    import workbench.ops.token_index  # noqa: F401

    operators = torch.ops.workbench
    return {
        torch.ops.aten.linalg_solve_triangular: _counted(_solve_triangular),
        operators.visible_block_attention: _counted(_visible_block_attention),
        operators.selected_attention: _counted(_selected_attention),
        operators.select_blocks: _counted(_select_blocks),
        operators.select_tokens: _counted(_select_tokens),
    }


@contextlib.contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Counts FLOPs of matrix products without gradients: attention decomposed into its products; in sparse attention
    the pairs of queries and keys that see each other, one by one; of the delta rule with a decay per channel the blocks
    below the diagonal, whatever the decays."""
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), by_blocks(), counter:
        yield counter


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that ``call`` executes (:func:`counting_flops`)."""
    with counting_flops() as counter:
        call()
    return counter.get_total_flops()


# -- parameters, caches, attributes ----------------------------------------------------------------------------------


def parameters_in_use(module: nn.Module, y_ND: Tensor) -> float:
    """Parameters that take part in a token's output, the mean over the N tokens of ``y_ND``: of experts those whose
    gradient is not zero, of all others those that the output depends on or is chosen by."""
    roles, parameters = parameter_roles(module), dict(module.named_parameters())
    gradients = torch.autograd.grad(y_ND.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    chosen_by = getattr(module, "chosen_by", ())
    is_used = {
        name: gradient is not None or name.startswith(chosen_by) for name, gradient in zip(parameters, gradients)
    }
    experts = {name: p for name, p in parameters.items() if roles[name].role == Role.EXPERT}
    total = float(sum(p.numel() for name, p in parameters.items() if is_used[name] and name not in experts))
    if not experts:
        return total
    for y_D in y_ND:
        of_token = torch.autograd.grad((y_D * torch.randn_like(y_D)).sum(), list(experts.values()), retain_graph=True)
        total += sum(float(g[0].numel() * g.flatten(1).any(1).sum()) for g in of_token) / len(y_ND)
    return total


def reachable_tensors(value: Any, path: str = "cache") -> dict[str, Tensor]:
    """Every tensor among the attributes and items of ``value``, by path; modules and their tensors are left out."""
    found: dict[str, Tensor] = {}
    for where, item in _walk(value, path):
        if isinstance(item, Tensor):
            found[where] = item
    return found


def assert_lists_every_tensor(cache: Any, module: nn.Module) -> None:
    """Raise AssertionError if ``cache.tensors()`` leaves out memory that is reachable from the cache of ``module`` and
    is neither the module's nor that of the positions, which whoever makes the steps has."""
    positions = [] if getattr(cache, "positions_B", None) is None else [cache.positions_B]
    elsewhere = (*module.state_dict().values(), *positions)
    listed = {tensor.untyped_storage().data_ptr() for tensor in (*cache.tensors(), *elsewhere)}
    hidden = [
        path
        for path, tensor in reachable_tensors(cache).items()
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in listed
    ]
    assert not hidden, f"tensors() leaves out {', '.join(hidden)}"


def attributes(module: nn.Module) -> dict[str, Any]:
    """Values of all attributes of ``module`` and of the modules in it, by path: copies that can be compared."""
    values: dict[str, Any] = {}
    for path, owner in module.named_modules():
        for where, item in _walk(vars(owner), path):
            if isinstance(item, Tensor):
                flat = item.detach().cpu().contiguous().reshape(-1)
                values[where] = (item.dtype, tuple(item.shape), flat.view(torch.uint8).numpy().tobytes())
            elif isinstance(item, bool | int | float | complex | str | bytes | None):
                values[where] = item
    return values


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Paths and values below ``value``, each object once."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [(path, value)]
    while pending:
        where, item = pending.pop()
        if isinstance(item, nn.Module | Config | type | torch.Generator) or id(item) in seen:
            continue
        yield where, item
        if isinstance(item, Tensor | bool | int | float | complex | str | bytes | None):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            pending += [(f"{where}[{key!r}]", part) for key, part in item.items()]
        elif isinstance(item, list | tuple | set | frozenset):
            pending += [(f"{where}[{number}]", part) for number, part in enumerate(item)]
        elif is_dataclass(item):
            pending += [(f"{where}.{f.name}", getattr(item, f.name)) for f in fields(item)]
        elif hasattr(item, "__dict__") and not callable(item):
            pending += [(f"{where}.{name}", part) for name, part in vars(item).items()]


# -- precision -------------------------------------------------------------------------------------------------------

WIDE_OPERATIONS = frozenset(
    {
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "softplus",
        "logsigmoid",
        "log_sigmoid",
        "cumsum",
        "cumprod",
        "logcumsumexp",
    }
)
"""Functions that a mixer computes in at least fp32 whatever the model's type: in 16 bits a decay close to 1 becomes 1
and a running sum stops growing."""


class NarrowOperations(TorchFunctionMode):
    """Names of the :data:`WIDE_OPERATIONS` that are called while it is active and whose result has 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if name in WIDE_OPERATIONS and isinstance(result, Tensor) and result.dtype.itemsize == 2:
            self.names.add(name)
        return result
