"""A model as a decoding policy reads it: the beginning of every document in one pass, the rest token by token.

Predictions of a policy differ from those of the model only in decoding steps, which are passes over a single token. A
document is therefore decoded with its own tokens (teacher forcing), and losses and errors are those of its targets as
before, so that a metric is the same number under every policy and equals that of one pass under `dense`.

Legend: B rows, T tokens in a row, N documents that are decoded together, D model width, L layers, F fields.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import polars as pl
import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from workbench.config import Config, require
from workbench.decoding.calibration import Calibration, measure
from workbench.decoding.channels import CalibratedPolicy
from workbench.decoding.policy import CacheType, Policy, PolicyConfig, new_caches, policies
from workbench.decoding.reads import FIELDS, ReadLog, host_bytes
from workbench.evaluation.scores import Measured, Score
from workbench.model import LanguageModel, ModelConfig

SCORED_TOGETHER = 256
"""Positions of a prompt whose scores are in memory at once."""
STEPS_BETWEEN = 64
"""Steps after which progress is reported: a long document takes minutes."""
PHASES = ("prompt", "step")
"""Kinds of passes."""

__all__ = ["DecodedModel", "Decoder", "DecodingConfig"]


class DecodingConfig(Config):
    """How a model is measured through a decoding policy."""

    policy: Annotated[SerializeAsAny[PolicyConfig], BeforeValidator(policies.parse)] = Field(
        default="dense", validate_default=True
    )
    """The policy: a name, or a mapping with its ``kind``."""
    cache_dtype: CacheType = "model"
    """Type of what is cached: that of the model, bf16, or eight bits with a step size for every token and head."""
    prompt: Annotated[int, Field(ge=0)] = 0
    """Tokens at the beginning of a document that are read in one pass, at least. A document is read in one pass up to
    its first target, which is that of its first answer in a task, and decoded from this target on."""
    calibration_rows: Annotated[int, Field(ge=1)] = 16
    """Rows of training data on which the channels of a token index are calibrated, where the policy names no folder
    with a calibration."""

    def check(self, model: ModelConfig) -> None:
        """Check that a model can be decoded with the policy.

        Raises:
            ConfigError: naming the layers that the policy refuses, with paths relative to this configuration.
        """
        policy = policies[self.policy.kind](self.policy)
        with torch.device("meta"):
            language_model = LanguageModel(model)
        policy.check(language_model)
        if not isinstance(policy, CalibratedPolicy):
            new_caches(language_model, policy, 1, 1, self.cache_dtype)
            return
        require(  # its caches need a calibration
            self.cache_dtype in ("model", "bf16"),
            "cache_dtype",
            got=self.cache_dtype,
            expected=f"model or bf16: {self.policy.kind!r} reads chosen tokens in the type of the model",
        )

    def cache_bytes(self, model: ModelConfig, length: int, dtype: torch.dtype) -> int:
        """Bytes on the device of the caches of one sequence of ``length`` tokens, indices of the policy included.

        Args:
            model: with layers that :meth:`check` accepts.
            length: tokens of the sequence.
            dtype: type of the weights.
        """
        policy = policies[self.policy.kind](self.policy)
        if isinstance(policy, CalibratedPolicy):
            policy.calibration = _AnyChannels({}, {})
        with torch.device("meta"):
            caches = new_caches(LanguageModel(model).to(dtype), policy, 1, length, self.cache_dtype)
        # layers share some
        allocated = {x.untyped_storage()._cdata: x.nbytes for cache in caches for x in cache.tensors()}
        return sum(allocated.values()) - host_bytes(caches)


class _AnyChannels(Calibration):
    """Every channel is as important as any other: how many there are does not depend on which."""

    def of_layer(self, layer: int, G: int, K: int) -> Tensor:
        return torch.zeros(G, K)


class Decoder:
    """Reads documents through a policy, and keeps what its steps read.

    Args:
        config: the policy and the length of prompts.
        rows: gives rows (1, T) of training tokens to calibrate on.
        on_progress: called again and again while documents are decoded; may raise to stop.
    """

    def __init__(
        self,
        config: DecodingConfig,
        rows: Callable[[], Iterable[Tensor]],
        on_progress: Callable[[], None] = lambda: None,
    ):
        self.config, self.on_progress = config, on_progress
        self._rows = rows
        self._calibration: Calibration | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was read so far."""
        self._sums: dict[tuple[int, int], np.ndarray] = {}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Seconds of passes over prompts and of decoding steps."""
        self.passes = dict.fromkeys(PHASES, 0)
        """Numbers of them, each of a group of documents."""

    def policy(self, model: LanguageModel) -> Policy:
        """The policy, prepared for ``model``. The model is calibrated once: all that is measured have one run's
        weights.

        Raises:
            ConfigError: when the policy refuses the model, or lacks a calibration that it names.
        """
        policy = policies[self.config.policy.kind](self.config.policy)
        if isinstance(policy, CalibratedPolicy) and policy.needs_calibration and policy.config.calibration is None:
            if self._calibration is None:
                self._calibration = Calibration(measure(model, self._rows()), {}, "calibration on training rows")
            policy.calibration = self._calibration
        policy.prepare(model)
        return policy

    def add(self, log: ReadLog) -> None:
        """Add what the steps of one group of documents read."""
        for step, sequences, layers, numbers_LF in log.steps:
            values_LF = numbers_LF.cpu().numpy()
            known_LF = sequences * np.isfinite(values_LF)
            weighted_LF = np.where(known_LF > 0, sequences * values_LF, 0.0)
            for layer, weighted_F, known_F in zip(layers, weighted_LF, known_LF):
                sums_2F = self._sums.setdefault((step, layer), np.zeros((2, len(FIELDS))))
                sums_2F += (weighted_F, known_F)

    def scores(self) -> pl.DataFrame:
        """What was read as rows of the long table (:mod:`workbench.results.scores`), one "document" per step after the
        prompt, from 1, and layer, with both as labels; and the milliseconds of a pass over prompts and of a step.

        Metrics are :data:`workbench.decoding.reads.FIELDS`, and are left out where they are undefined.
        """
        keys = sorted(self._sums)
        labels = pl.DataFrame(keys, schema={"position": pl.Int64, "layer": pl.Int64}, orient="row")
        totals = np.array([self._sums[key] for key in keys]).reshape(len(keys), 2, len(FIELDS))
        frames = []
        for index, name in enumerate(FIELDS):
            sums_N, known_N = totals[:, 0, index], totals[:, 1, index]
            if (is_known_N := known_N > 0).any():
                score = Score(name, sums_N[is_known_N] / known_N[is_known_N], known_N[is_known_N])
                frames.append(Measured([score], labels.filter(is_known_N)).frame())
        for phase, passes in self.passes.items():
            if passes:
                score = Score(f"milliseconds per {phase}", total=1000 * self.seconds[phase] / passes)
                frames.append(Measured([score]).frame())
        return pl.concat(frames, how="diagonal")


class _Document(NamedTuple):
    """One document in a batch."""

    row: int
    first: int
    """Its first position in the row."""
    length: int
    """Its tokens up to the last target."""
    prompt: int
    """Of these, the tokens that are read in one pass."""


class DecodedModel:
    """The losses of a model whose documents are read by a :class:`Decoder`, with the methods that suites call.

    Args:
        model: in evaluation mode.
        decoder: the policy.
        bf16: decode with a copy of the model in bf16, as an export in bf16 would be.
    """

    def __init__(self, model: LanguageModel, decoder: Decoder, *, bf16: bool = False):
        self.model = copy.deepcopy(model).to(torch.bfloat16) if bf16 else model
        self.decoder = decoder
        self.policy = decoder.policy(self.model)

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor, *, segments: Tensor) -> Tensor:
        """As :meth:`workbench.model.LanguageModel.token_losses`."""
        return self.answer_losses(tokens_BT, targets_BT, segments=segments)[0]

    def answer_losses(self, tokens_BT: Tensor, targets_BT: Tensor, *, segments: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`workbench.model.LanguageModel.answer_losses`."""
        losses_BT = torch.zeros(targets_BT.shape, device=tokens_BT.device)
        wrong_BT = torch.zeros(targets_BT.shape, device=tokens_BT.device, dtype=torch.bool)
        groups: dict[int, list[_Document]] = {}
        for document in self._documents(targets_BT.cpu().numpy(), segments.cpu().numpy()):
            groups.setdefault(document.prompt, []).append(document)
        with torch.autocast(tokens_BT.device.type, enabled=False):
            for group in groups.values():
                group.sort(key=lambda document: document.length)
                for first in range(0, len(group), len(tokens_BT)):
                    self._decode(group[first : first + len(tokens_BT)], tokens_BT, targets_BT, losses_BT, wrong_BT)
                    self.decoder.on_progress()
        return losses_BT, wrong_BT

    def _documents(self, targets_BT: np.ndarray, segments_BT: np.ndarray) -> Iterable[_Document]:
        for row, (targets_T, segments_T) in enumerate(zip(targets_BT, segments_BT)):
            for segment in np.unique(segments_T[segments_T >= 0]):
                positions = np.flatnonzero(segments_T == segment)
                with_target = np.flatnonzero(targets_T[positions] >= 0)
                if len(with_target):
                    length = int(with_target[-1]) + 1
                    prompt = min(max(int(with_target[0]), self.decoder.config.prompt), length)
                    yield _Document(row, int(positions[0]), length, prompt)

    def _decode(
        self,
        group: Sequence[_Document],
        tokens_BT: Tensor,
        targets_BT: Tensor,
        losses_BT: Tensor,
        wrong_BT: Tensor,
    ) -> None:
        """Fill in losses and errors of documents with prompts of one length."""
        longest, prompt = group[-1].length, group[0].prompt
        row_N1, first_N1, length_N1 = (
            torch.tensor(values, device=tokens_BT.device)[:, None]
            for values in zip(*((document.row, document.first, document.length) for document in group))
        )
        offset_T = torch.arange(longest, device=tokens_BT.device)
        position_NT = first_N1 + offset_T.minimum(length_N1 - 1)  # shorter documents repeat their last token
        tokens_NT = tokens_BT[row_N1, position_NT]
        targets_NT = targets_BT[row_N1, position_NT].where(offset_T < length_N1, -1).clamp_min(-1)
        caches = new_caches(self.model, self.policy, len(group), longest, self.decoder.config.cache_dtype)
        log, losses, wrong = ReadLog(), [], []

        def score(hidden_NTD: Tensor, first: int) -> None:
            chosen_NT = targets_NT[:, first : first + hidden_NTD.shape[1]]
            scores_NTV = self.model.logits(hidden_NTD).float()
            flat = scores_NTV.flatten(0, 1), chosen_NT.flatten()
            found_NT = nn.functional.cross_entropy(*flat, ignore_index=-1, reduction="none").view_as(chosen_NT)
            losses.append(found_NT)
            wrong.append((scores_NTV.argmax(-1) != chosen_NT) & (chosen_NT >= 0))

        start = time.perf_counter()
        if prompt:
            hidden_NTD = self.model(tokens_NT[:, :prompt], caches=caches)
            for first in range(0, prompt, SCORED_TOGETHER):  # scores of few positions are in memory at once
                score(hidden_NTD[:, first : first + SCORED_TOGETHER], first)
        middle = self._now(tokens_BT)
        for at in range(prompt, longest):
            score(self.model(tokens_NT[:, at : at + 1], caches=caches), at)
            log.record(at - prompt + 1, len(group), caches)
            if (at - prompt) % STEPS_BETWEEN == 0:
                self.decoder.on_progress()
        end = self._now(tokens_BT)
        self.decoder.seconds["prompt"] += middle - start
        self.decoder.seconds["step"] += end - middle
        self.decoder.passes["prompt"] += bool(prompt)
        self.decoder.passes["step"] += longest - prompt
        self.decoder.add(log)
        inside_NT = offset_T < length_N1
        rows_NT = row_N1.expand_as(position_NT)
        losses_BT[rows_NT[inside_NT], position_NT[inside_NT]] = torch.cat(losses, 1)[inside_NT].to(losses_BT.dtype)
        wrong_BT[rows_NT[inside_NT], position_NT[inside_NT]] = torch.cat(wrong, 1)[inside_NT]

    @staticmethod
    def _now(like: Tensor) -> float:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        return time.perf_counter()
