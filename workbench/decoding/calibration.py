"""Which key channels matter: measured once per model on a few texts, stored beside its weights.

Importance of channel c for the heads that share keys (AsyncTLS, arXiv 2604.07815, §4.1, after Double Sparsity, arXiv
2408.07092):

    imp[c] = (1/G) Σ_h (max |q_h[c]|) · (max |k[c]|)        maxima over the calibration tokens, h the heads of a group

The file ``calibration.json`` has the importance of every channel, so that a policy may take any number of them, and its
provenance: corpus, tokens, code, and the fingerprint of the weights.

Legend: B rows, T tokens of a row, H query heads, G groups of heads that share keys, K key channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from workbench.config import ConfigError, require
from workbench.contract import Cache
from workbench.data.corpora import corpora
from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.decoding.view import View, view_of
from workbench.environment import choose_device, code_version
from workbench.files import write_json
from workbench.mixers.families.latent import LatentCache
from workbench.mixers.families.softmax import KeyValueCache
from workbench.model import LanguageModel
from workbench.pretrained import fingerprint, load
from workbench.pretrained.folder import CALIBRATION
from workbench.pretrained.tensors import read_json_file

FORMAT = 1
"""Version of the file, for a reader that must refuse a later one."""


@dataclass(frozen=True)
class Calibration:
    """Importance of key channels."""

    importance: dict[int, Tensor]
    """Layer -> (G, K), fp32."""
    provenance: dict[str, Any]
    """Corpus, rows and tokens, code, fingerprint of the weights."""
    source: str = "the calibration"
    """Where it was read from, for messages."""

    def of_layer(self, layer: int, G: int, K: int) -> Tensor:
        """(G, K) importance in one layer.

        Raises:
            ConfigError: when it is missing or of another shape.
        """
        importance = self.importance.get(layer)
        got = "nothing" if importance is None else f"{tuple(importance.shape)} channels"
        require(
            importance is not None and importance.shape == (G, K),
            "policy.calibration",
            got=f"{self.source} with {got} for layer {layer}",
            expected=f"({G}, {K}), groups and channels of its keys",
            do="Calibrate this model: `workbench calibrate FOLDER CORPUS`.",
        )
        assert importance is not None
        return importance


class _Recorder:
    """Base of caches that attend as usual and remember the largest magnitudes of queries and keys."""

    view: View
    q_HK: Tensor | None = None
    k_GK: Tensor | None = None

    def attend(self, *inputs: Tensor) -> Tensor:
        queries, new = inputs[:-2], inputs[-2:]
        q_HK = self.view.queries(*queries).abs().amax((0, 1)).float()
        k_GK = self.view.keys(*new).abs().amax((0, 1)).float()
        self.q_HK = q_HK if self.q_HK is None else torch.maximum(self.q_HK, q_HK)
        self.k_GK = k_GK if self.k_GK is None else torch.maximum(self.k_GK, k_GK)
        return super().attend(*inputs)  # type: ignore[misc]

    def importance(self) -> Tensor:
        """(G, K)"""
        assert self.q_HK is not None and self.k_GK is not None
        return self.q_HK.unflatten(0, (len(self.k_GK), -1)).mean(1) * self.k_GK


class _HeadsRecorder(_Recorder, KeyValueCache):
    """Keys and values."""


class _LatentRecorder(_Recorder, LatentCache):
    """Latents."""


@torch.inference_mode()
def measure(model: LanguageModel, rows: Iterable[Tensor]) -> dict[int, Tensor]:
    """Importance of the key channels of every layer that keeps all tokens: layer -> (G, K), fp32 on the CPU.

    Args:
        model: in evaluation mode.
        rows: (B, T) token ids each; at least one.

    Raises:
        ConfigError: when there is no such layer, or no row.
    """
    maxima: dict[int, tuple[Tensor, Tensor]] = {}

    def cache_for(layer: int, mixer: Any, *shape: Any) -> Cache:
        view = view_of(mixer)
        if view is None:
            return mixer.new_cache(*shape)
        cache = (_HeadsRecorder if view.cache is KeyValueCache else _LatentRecorder)(mixer, *shape)
        cache.view = view
        if layer in maxima:
            cache.q_HK, cache.k_GK = maxima[layer]
        return cache

    device, importance = model.embedding.weight.device, {}
    for tokens_BT in rows:
        B, T = tokens_BT.shape
        caches = model.new_caches(B, T, cache_for)
        model(tokens_BT.to(device), caches=caches)
        for layer, cache in enumerate(caches):
            if isinstance(cache, _Recorder):
                assert cache.q_HK is not None and cache.k_GK is not None
                maxima[layer] = cache.q_HK, cache.k_GK
                importance[layer] = cache.importance().cpu()
    require(
        importance,
        "model",
        got=", ".join(sorted({layer.mixer.kind for layer in model.config.layers})),
        expected="rows of tokens, and a layer of full or latent attention without a window, whose keys are calibrated",
    )
    return importance


def rows_of(corpus: Any, tokenizer: Tokenizer, rows: int, context: int) -> Iterator[Tensor]:
    """``rows`` rows (1, ``context``) of token ids: documents one after the other, each after the document symbol.

    Raises:
        ConfigError: when the corpus is too small.
    """
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    pending: list[int] = []
    produced = 0
    for text in corpora[corpus.kind](corpus).documents():
        pending += [] if symbol is None else [symbol]
        pending += tokenizer.encode(text, add_special_tokens=symbol is None).ids
        full = len(pending) // context
        for number in range(min(full, rows - produced)):
            yield torch.tensor([pending[number * context : (number + 1) * context]])
        pending, produced = pending[full * context :], produced + full
        if produced >= rows:
            return
    raise ConfigError.at(
        "rows",
        got=f"{rows} of {context} tokens",
        expected=f"at most {produced}, as many as the corpus fills",
        do="Give a larger corpus, fewer rows, or a shorter context.",
    )


def calibrate(
    folder: str | Path, corpus: Any, *, rows: int = 16, context: int = 4096, device: str | None = None
) -> Path:
    """Measure an exported model or a checkpoint, and write :data:`CALIBRATION` beside its weights.

    Args:
        folder: as for :func:`workbench.pretrained.load`.
        corpus: a corpus by name, or with settings; its first documents are used. Take texts on which the model is not
            judged.
        rows: sequences.
        context: tokens of a sequence; channels that only long sequences use show in long rows alone.
        device: its name. Default: a GPU if there is one.

    Returns:
        the file.

    Raises:
        ConfigError: for a folder, a corpus, sizes or a device that cannot be used.
    """
    config, on = corpora.parse(corpus), choose_device(device)
    require(rows >= 1, "rows", got=rows, expected="at least 1")
    require(context >= 2, "context", got=context, expected="at least 2")
    model, tokenizer = load(folder)
    importance = measure(model.to(on), rows_of(config, tokenizer, rows, context))
    provenance = {
        "corpus": config.plain(),
        "rows": rows,
        "context": context,
        "tokens": rows * context,
        "code": code_version(),
        "weights": fingerprint(folder),
    }
    values = {str(layer): importance_GK.tolist() for layer, importance_GK in importance.items()}
    write_json(Path(folder) / CALIBRATION, {"format": FORMAT, "provenance": provenance, "importance": values})
    return Path(folder) / CALIBRATION


def read_calibration(folder: str | Path) -> Calibration | None:
    """The calibration beside the weights in ``folder``; None where there is none.

    Raises:
        ConfigError: when the file is damaged, or of other weights than the folder's.
    """
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    again = "Calibrate again: `workbench calibrate FOLDER CORPUS`."
    fields = read_json_file(path)
    require(fields.get("format") == FORMAT, str(path), got=fields.get("format"), expected=f"format {FORMAT}", do=again)
    try:
        importance = {int(layer): torch.tensor(values) for layer, values in fields["importance"].items()}
        provenance = dict(fields["provenance"])
        finite = all(bool(tensor.isfinite().all()) for tensor in importance.values())
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError.at(str(path), got=f"a damaged file ({error})", expected="a calibration", do=again) from None
    require(finite, str(path), got="numbers that are not finite", expected="a calibration", do=again)
    require(
        provenance.get("weights") == fingerprint(folder),
        str(path),
        got=f"a calibration of the weights {provenance.get('weights')}",
        expected=f"one of the weights beside it, {fingerprint(folder)}",
        do=again,
    )
    return Calibration(importance, provenance, str(path))
