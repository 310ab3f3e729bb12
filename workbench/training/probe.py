"""Time and memory of a run on this device, measured on shrunken runs and extrapolated to the whole depth.

Times, and the peak memory of each phase, are a constant (embedding, head, loss, their part of the optimiser) plus an
amount per span (a block, or a pair with its shortcut); spans of one configuration cost the same. So a run with one
span of each kind, and one more run per kind with a few more, give the whole model. Exact for what is affine in depth
(our method). The steps are those of training itself: packed rows, clipping, the optimiser. Start-up is the model, its
compilation and the first step; an evaluation is timed on a batch of training rows.

Legend: B rows, T tokens in a row.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.compat import TorchDispatchMode, tree_leaves
from workbench.data import IGNORE_INDEX, RowStream, StepLoader
from workbench.evaluation.suites import inference
from workbench.model import LanguageModel
from workbench.model.config import Span
from workbench.training import parallel
from workbench.training.config import RunConfig
from workbench.training.memory import retain_freed_memory
from workbench.training.step import TrainStep, build_step
from workbench.training.suites import run_settings
from workbench.training.weight_transforms import ScheduledTransforms

__all__ = ["Measured", "measure", "measure_shrunken", "shrunken"]

EXTRA_SPANS = 3
"""Spans that a kind's second run has in addition, if the model has as many: the more, the smaller the error."""
WARM_UP_STEPS = 2
"""Steps before anything is timed: they compile, and allocate the optimiser's state."""
MIN_TIMED_SECONDS = 1.0
"""Timing ends when the timed steps have taken this long in total."""
MIN_STEPS, MAX_STEPS = 3, 12
"""Limits of the number of timed steps."""
PHASES = ("forward", "backward", "update", "checkpoint")
"""Phases of a step; each has its own peak."""


@dataclass(frozen=True)
class Measured:
    """Time and memory of a run on this device."""

    seconds: float
    """Of one optimiser step, the median."""
    peaks: dict[str, int]
    """Largest number of bytes allocated by tensors in each of :data:`PHASES`, weights and optimiser included; zeros
    where it cannot be measured (compiled code on a CPU)."""
    startup: float = 0.0
    """Seconds from an empty process to the end of the first step, compilation of the evaluation included, without the
    imports that trials share."""
    evaluation: float | None = None
    """Seconds of a batch of an evaluation; None where it was not measured: a decoding policy reads token by token."""

    @property
    def peak_bytes(self) -> int:
        """Largest of all phases."""
        return max(self.peaks.values())


class _SyntheticRows(RowStream):
    """Random rows of two documents each, with as many targets as the data source has."""

    def __init__(self, config: RunConfig):
        self.T, self.vocabulary = config.training.context, config.model.vocabulary or 2
        self.target_every = round(1 / config.data.target_share(self.T))

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens_T = np.random.default_rng(r).integers(self.vocabulary, size=self.T)
        positions_T = np.arange(self.T)
        targets_T = np.where(positions_T % self.target_every == 0, tokens_T, IGNORE_INDEX)
        segments_T = (positions_T > self.T // 2).astype(np.int32)
        return tokens_T, targets_T, segments_T, segments_T.astype(np.int64)


class Meter:
    """Times micro-batches and records the peak memory of phases. Its :meth:`on_phase` is called by the training step.

    Args:
        accumulate: micro-batches in a step.
        now: current time in seconds.
    """

    def __init__(self, accumulate: int, now: Callable[[], float] = time.perf_counter):
        self.accumulate, self.now = accumulate, now
        self.first_seconds: list[float] = []
        """Of timed micro-batches that only accumulate gradients."""
        self.count_seconds: list[float] = []
        """Of timed micro-batches that only count, which every micro-batch does once more in a step that needs it."""
        self.last_seconds: list[float] = []
        """Of timed micro-batches that end with the optimiser's update."""
        self.peaks = dict.fromkeys(PHASES, 0)
        self.steps = self.micro_batches = 0
        self.memory: _CudaMemory | _CpuMemory | None = None

    @property
    def done(self) -> bool:
        """Whether enough steps have been timed."""
        timed_steps = len(self.last_seconds)
        timed_seconds = sum(self.count_seconds) + sum(self.first_seconds) + sum(self.last_seconds)
        return timed_steps >= MAX_STEPS or (timed_steps >= MIN_STEPS and timed_seconds >= MIN_TIMED_SECONDS)

    @property
    def seconds(self) -> float:
        """Of one step of ``accumulate`` micro-batches."""
        first, count = (float(np.median(seconds or [0.0])) for seconds in (self.first_seconds, self.count_seconds))
        return float(np.median(self.last_seconds)) + (self.accumulate - 1) * first + self.accumulate * count

    def begin_step(self, step: TrainStep, *, compiled: bool) -> None:
        """Call before every step. Memory is measured in the last warm-up step: all is allocated, nothing is timed."""
        self.on_cuda = step.device.type == "cuda"
        self.micro_batches = 0
        if self.steps == WARM_UP_STEPS - 1 and (self.on_cuda or not compiled):
            copies = [] if step.roll_back is None else step.roll_back.tensors()
            allocated = [*step.model.parameters(), *step.model.buffers(), *_state_tensors(step.optimiser), *copies]
            self.memory = _CudaMemory() if self.on_cuda else _CpuMemory(allocated)
            self.memory.begin()
        self.start = self.now()

    def on_phase(self, phase: str) -> None:
        """Called by the training step after a phase of a micro-batch."""
        if self.memory is not None:
            peaks_of = "forward" if phase == "count" else phase
            self.peaks[peaks_of] = max(self.peaks[peaks_of], self.memory.phase())
        if phase == "backward":
            self.micro_batches += 1
        accumulates = phase == "backward" and self.micro_batches < self.accumulate
        if not (accumulates or phase in ("count", "update")):
            return
        if self.on_cuda:
            torch.cuda.synchronize()
        if self.steps >= WARM_UP_STEPS:
            seconds = self.first_seconds if accumulates else self.last_seconds
            (self.count_seconds if phase == "count" else seconds).append(self.now() - self.start)
        self.start = self.now()

    def end_step(self, step: TrainStep) -> None:
        """Call after every step."""
        if self.memory is not None:
            # a checkpoint copies the optimiser's state on its device
            self.peaks["checkpoint"] = self.memory.end() + _bytes(_state_tensors(step.optimiser))
            self.memory = None
        self.steps += 1


class _CudaMemory:
    """Peaks between two calls, from the allocator's statistics."""

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def phase(self) -> int:
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def end(self) -> int:
        return torch.cuda.memory_allocated()


class _CpuMemory(TorchDispatchMode):
    """The same on a CPU, whose allocator has no statistics: every storage that an operation creates is tracked until
    it is freed. Memory that an operation allocates internally is not counted.

    Args:
        allocated: tensors that exist at the beginning.
    """

    def __init__(self, allocated: Iterable[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self.tracked: set[int] = set()
        for tensor in allocated:
            self._track(tensor)

    def begin(self) -> None:
        self.__enter__()

    def phase(self) -> int:
        peak, self.peak = self.peak, self.bytes
        return peak

    def end(self) -> int:
        self.__exit__(None, None, None)
        return self.bytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                self._track(tensor)
        return out

    def _track(self, tensor: Tensor) -> None:
        if id(storage := tensor.untyped_storage()) in self.tracked:
            return
        self.tracked.add(id(storage))
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.tracked.discard(key)
        self.bytes -= size


def _state_tensors(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimiser.state.values() for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


EVALUATED_BATCHES = 3
"""Batches of an evaluation that are timed, after one that compiles."""


def _evaluation_seconds(train_step: TrainStep, config: RunConfig, stream: RowStream, rows: int) -> tuple[float, float]:
    """Seconds of the first batch of an evaluation, and the median of further ones."""
    batch = stream.batch(range(rows))
    tensors = (tensor.to(train_step.device) for tensor in (batch.tokens_BT, batch.targets_BT, batch.segments_BT))
    tokens_BT, targets_BT, segments_BT = tensors
    seconds = []
    with inference(train_step.model, run_settings(config)):
        for _ in range(1 + EVALUATED_BATCHES):
            start = time.perf_counter()
            train_step.model.token_losses(tokens_BT, targets_BT, segments=segments_BT).cpu()
            seconds.append(time.perf_counter() - start)
    return seconds[0], float(np.median(seconds[1:]))


def measure(config: RunConfig, stream: RowStream | None = None, *, ranks: int = 1) -> Measured:
    """Train ``config`` for a few steps on this device and discard the model.

    Args:
        config: the run.
        stream: training rows; default random rows of two documents each.
        ranks: of the run, of which this device does the work of one: its rows of every micro-batch, on whole weights,
            without communication. Evaluation is that of the run.

    Raises:
        torch.OutOfMemoryError: when it does not fit.
    """
    from workbench.training.trial import deterministic_algorithms

    training = config.training
    accumulate = min(training.accumulate, 2)
    steps = WARM_UP_STEPS + MAX_STEPS
    rows = training.batch_size // ranks
    short = training.changed(
        batch_size=rows, tokens=steps * rows * training.context * accumulate, accumulate=accumulate
    )
    model_config = config.model
    if model_config.mtp is not None:  # as in the later part of the run, which needs more
        model_config = model_config.model_copy(update={"mtp": model_config.mtp.changed(start=0.0)})
    config = config.model_copy(update={"training": short, "model": model_config})
    meter = Meter(accumulate)
    stream = stream or _SyntheticRows(config)
    loader = StepLoader(
        stream,
        config.batch_plan,
        batch_size=short.batch_size,
        accumulate=accumulate,
        steps=steps,
    )
    random_state = torch.get_rng_state()
    train_step = None
    startup, evaluation = 0.0, None
    began = time.perf_counter()
    try:
        with (
            deterministic_algorithms(strict=training.deterministic),
            retain_freed_memory(),
            warnings.catch_warnings(),
            contextlib.closing(iter(loader)) as batches,
        ):
            warnings.simplefilter("ignore")
            model = LanguageModel(config.model, seed=config.seed_of("init"))
            train_step, compiled = build_step(model, config, parallel.launch(devices=1), meter.on_phase)
            del model
            train_step.step_lengths = loader.lengths
            train_step.diagnose_at = set()  # few steps of a run write diagnostics
            train_step.warm_ups = [None for _ in train_step.warm_ups]  # most steps are behind the stage at the start
            scheduled = ScheduledTransforms(config, train_step)
            # whose scales take memory for the rest of the run
            scheduled.apply([transform for transform in scheduled.transforms if transform.config.needs_optimiser])
            while not meter.done:
                meter.begin_step(train_step, compiled=compiled)
                train_step(meter.steps + 1, batches)
                meter.end_step(train_step)
                startup = startup or time.perf_counter() - began
            if config.decoding is None:
                first, evaluation = _evaluation_seconds(train_step, config, stream, training.batch_size)
                startup += max(0.0, first - evaluation)
        meter.accumulate = training.accumulate
        return Measured(meter.seconds, meter.peaks, startup, evaluation)
    finally:
        train_step = None
        torch.set_rng_state(random_state)
        gc.collect()
        if torch.cuda.is_available():
            torch._dynamo.reset()  # compiled code stays in the cache on disk, where trials find it
            torch.cuda.empty_cache()


def shrunken(spans: Sequence[Span]) -> list[tuple[tuple[Span, ...], Span | None, int]]:
    """The runs that are measured for a model of ``spans``.

    Returns:
        Per run its spans, the kind that is repeated (None in the first run), and how many more of it there are.
    """
    counts = Counter(spans)
    base = tuple(counts)
    runs: list[tuple[tuple[Span, ...], Span | None, int]] = [(base, None, 0)]
    for span, count in counts.items():
        if extra := min(EXTRA_SPANS, count - 1):
            runs.append((base + (span,) * extra, span, extra))
    return runs


def measure_shrunken(
    config: RunConfig, stream: RowStream | None = None, measure: Callable[..., Measured] = measure
) -> Measured:
    """Time and memory of ``config``, from shrunken runs of it; of a run that grows, the mean time over its steps, the
    start-up of all its models, and the memory and evaluations of its large model.

    Args:
        config: the run.
        stream: training rows; default random rows of two documents each.
        measure: measures one run.

    Raises:
        torch.OutOfMemoryError: when even a shrunken run does not fit.
    """
    if config.growth is not None:
        phases = config.phases
        parts = [
            measure_shrunken(config.model_copy(update={"model": phase.model, "growth": None}), stream, measure)
            for phase in phases
        ]
        seconds = sum(part.seconds * (phase.last - phase.first) for part, phase in zip(parts, phases))
        startup = sum(part.startup for part in parts)
        return Measured(seconds / config.training.steps, parts[-1].peaks, startup, parts[-1].evaluation)
    counts = Counter(config.model.spans)
    runs = shrunken(config.model.spans)
    if not config.model.repeats or sum(len(spans) for spans, _, _ in runs) >= len(config.model.spans):
        return measure(config, stream)  # no more work than the shrunken ones

    def values(spans: tuple[Span, ...]) -> np.ndarray:
        measured = measure(config.model_copy(update={"model": config.model.with_spans(spans)}), stream)
        evaluation = np.nan if measured.evaluation is None else measured.evaluation
        times = (measured.seconds, measured.startup, evaluation)
        return np.array([*times, *(measured.peaks[phase] for phase in PHASES)])

    (base_spans, _, _), *others = runs
    base = values(base_spans)
    total = base.copy()
    for spans, span, extra in others:
        assert span is not None
        per_span = np.maximum(values(spans) - base, 0) / extra
        total += per_span * (counts[span] - 1)
    seconds, startup, evaluation = map(float, total[:3])
    peaks = {phase: round(value) for phase, value in zip(PHASES, total[3:])}
    return Measured(seconds, peaks, startup, None if np.isnan(evaluation) else evaluation)
