"""What training takes on this device, measured: a few real steps of shrunken runs, carried on to the whole depth.

A step's time, and the memory at the peak of each of its phases, are a constant (embedding, head, loss, their share of the
optimiser) plus an amount for every span (a block, or a pair with its shortcut); spans of one configuration take the same.
So a run of one span of each kind, and one more run a kind with a few more, give the whole model: exact for what is affine in depth (ours). The steps
are those of training itself: Lightning's loop, packed rows, clipping, AdamW.

Legend: B rows, T tokens in a row.
"""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.data import IGNORE_INDEX, RowStream, StepLoader, batch_plans
from workbench.model.config import Span
from workbench.training.config import RunConfig
from workbench.training.memory import freed_memory_kept
from workbench.training.module import Training

__all__ = ["Measured", "measure", "shrunken", "whole"]

EXTRA = 3
"""Spans more of one kind in its second run, where the model has so many: the further apart, the smaller the error."""
WARM_UP = 2
"""Steps before anything is measured: they compile, and make the optimiser's moments."""
ENOUGH = 1.0
"""Seconds of steps that are timed."""
FEWEST, MOST = 3, 12
"""Steps that are timed at least, and at most."""
PHASES = ("forward", "backward", "update", "checkpoint")
"""Phases of a step; each has its own peak."""


@dataclass(frozen=True)
class Measured:
    """What a training step takes on this device."""

    seconds: float
    """Of one optimiser step, the median."""
    peaks: dict[str, int]
    """Largest number of bytes that tensors take in each of :data:`PHASES`, weights and optimiser included; zeros where it
    cannot be seen (compiled code on a CPU)."""

    @property
    def peak_bytes(self) -> int:
        """Largest of all phases."""
        return max(self.peaks.values())


class _Rows(RowStream):
    """Made-up rows of two documents each, with as many targets as the data source says."""

    def __init__(self, config: RunConfig):
        self.T, self.vocabulary = config.training.context, config.model.vocabulary or 2
        self.every = round(1 / config.data.target_share(self.T))

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens_T = np.random.default_rng(r).integers(self.vocabulary, size=self.T)
        at_T = np.arange(self.T)
        targets_T = np.where(at_T % self.every == 0, tokens_T, IGNORE_INDEX)
        segments_T = (at_T > self.T // 2).astype(np.int32)
        return tokens_T, targets_T, segments_T, segments_T.astype(np.int64)


class _Watch(Callback):
    """Times micro-batches and takes the peaks of phases, then ends the training."""

    def __init__(self, accumulate: int):
        self.accumulate = accumulate
        self.micro: list[float] = []
        self.last: list[float] = []
        self.peaks = dict.fromkeys(PHASES, 0)
        self.steps = 0
        self.memory: _CudaMemory | _CpuMemory | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.cuda = module.device.type == "cuda"
        self.began = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if (
            self.steps == WARM_UP - 1 and self.memory is None and (self.cuda or not module.compiled)
        ):  # the last step of the warm-up has all there is, and time
            moments = (t for state in trainer.optimizers[0].state.values() for t in state.values())
            held = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters()), *moments]
            self.memory = _CudaMemory() if self.cuda else _CpuMemory(held)
            self.memory.begin()

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._phase("forward")

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._phase("backward")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        ends = (index + 1) % self.accumulate == 0
        if ends:
            module.note_step(self.steps + 1)
            module.diagnosis()
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.steps >= WARM_UP:
            (self.last if ends else self.micro).append(now - self.began)
        if ends:
            self._phase("update")
            if self.memory is not None:
                if self.steps < WARM_UP:
                    # a checkpoint copies the optimiser's state where it lies, the gradients being there still
                    moments = [t for s in trainer.optimizers[0].state.values() for t in s.values()]
                    self.peaks["checkpoint"] = self.memory.end() + _bytes(moments)
                self.memory.active = False
            self.steps += 1
        timed = sum(self.micro) + sum(self.last)
        if self.steps >= WARM_UP + MOST or (self.steps >= WARM_UP + FEWEST and timed >= ENOUGH):
            trainer.should_stop = True
        self.began = time.perf_counter()

    def _phase(self, name: str) -> None:
        if self.memory is not None and self.memory.active:
            self.peaks[name] = max(self.peaks[name], self.memory.phase())

    @property
    def seconds(self) -> float:
        """Of one step of ``accumulate`` micro-batches."""
        return float(np.median(self.last)) + (self.accumulate - 1) * float(np.median(self.micro or [0.0]))


class _CudaMemory:
    """Peaks between two calls, as the allocator counts them."""

    active = True

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def phase(self) -> int:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def end(self) -> int:
        return torch.cuda.memory_allocated()


class _CpuMemory(TorchDispatchMode):
    """The same on a CPU, whose allocator does not count: every storage that an operation makes is followed until it is freed.
    Room that an operation takes inside is not seen."""

    active = True

    def __init__(self, held: list[Any]):
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()
        for tensor in held:
            self._follow(tensor)

    def begin(self) -> None:
        self.__enter__()

    def phase(self) -> int:
        peak, self.peak = self.peak, self.held
        return peak

    def end(self) -> int:
        self.__exit__(None, None, None)
        return self.held

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not (isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) in given):
                self._follow(tensor)
        return out

    def _follow(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor) or id(storage := tensor.untyped_storage()) in self.known:
            return
        self.known.add(id(storage))
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))


def measure(config: RunConfig, stream: RowStream | None = None) -> Measured:
    """Train ``config`` for a few steps on this device and throw the model away.

    Args:
        config: the run.
        stream: training rows; default made-up rows of two documents each.

    Raises:
        torch.OutOfMemoryError: when it does not fit.
    """
    from workbench.training.trial import repeatable, trainer_for

    training = config.training
    accumulate = min(training.accumulate, 2)
    steps = WARM_UP + MOST
    short = training.changed(tokens=steps * training.batch_size * training.context * accumulate, accumulate=accumulate)
    model = config.model
    if model.mtp is not None:  # as in the later part of the run, which needs more
        model = model.model_copy(update={"mtp": model.mtp.changed(start=0.0)})
    config = config.model_copy(update={"training": short, "model": model})
    watch = _Watch(accumulate)
    loader = StepLoader(
        stream or _Rows(config),
        batch_plans[short.batch_plan.kind](short.batch_plan),
        batch_size=short.batch_size,
        accumulate=accumulate,
        steps=steps,
    )
    random = torch.get_rng_state()
    module = trainer = None
    try:
        with repeatable(strict=training.deterministic), freed_memory_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = Training(config)
            module.diagnose_at = set()  # few steps of a run are watched
            trainer = trainer_for(short, 1, watch)
            trainer.fit(module, train_dataloaders=loader)
        watch.accumulate = training.accumulate
        return Measured(watch.seconds, watch.peaks)
    finally:
        module = trainer = None
        torch.set_rng_state(random)
        gc.collect()
        if torch.cuda.is_available():
            torch._dynamo.reset()  # what was compiled stays in the cache on disk, where trials find it
            torch.cuda.empty_cache()


def shrunken(spans: Sequence[Span]) -> list[tuple[tuple[Span, ...], Span | None, int]]:
    """The runs that are measured for a model of these ``spans``: their own spans, the kind they have more of, how many more."""
    counts = Counter(spans)
    one = tuple(counts)
    runs: list[tuple[tuple[Span, ...], Span | None, int]] = [(one, None, 0)]
    for span, count in counts.items():
        if more := min(EXTRA, count - 1):
            runs.append((one + (span,) * more, span, more))
    return runs


def whole(config: RunConfig, stream: RowStream | None = None, run: Callable[..., Measured] = measure) -> Measured:
    """What a step of ``config`` takes on this device, from shrunken runs of it.

    Args:
        config: the run.
        stream: training rows; default made-up rows of two documents each.
        run: what measures a shrunken run.

    Raises:
        torch.OutOfMemoryError: when even a shrunken run does not fit.
    """
    counts = Counter(config.model.spans)
    runs = shrunken(config.model.spans)
    if sum(len(spans) for spans, _, _ in runs) >= len(config.model.spans):
        return run(config, stream)  # no more work than the shrunken ones

    def numbers(spans: tuple[Span, ...]) -> np.ndarray:
        found = run(config.model_copy(update={"model": config.model.with_spans(spans)}), stream)
        return np.array([found.seconds, *(found.peaks[phase] for phase in PHASES)])

    (one, _, _), *others = runs
    first = numbers(one)
    total = first.copy()
    for spans, span, more in others:
        assert span is not None
        each = np.maximum(numbers(spans) - first, 0) / more
        total += each * (counts[span] - 1)
    return Measured(float(total[0]), {phase: round(value) for phase, value in zip(PHASES, total[1:])})
