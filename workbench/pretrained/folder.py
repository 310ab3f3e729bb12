"""A trained model as a folder in the manner of Hugging Face.

    config.json             architecture, vocabulary, the whole ModelConfig with every default filled in, provenance
    model.safetensors       weights by the names of LanguageModel, a tied head once; or shards and an index
    tokenizer.json          for the `tokenizers` library; it puts the document symbol in front of a text, as training did
    tokenizer_config.json   for transformers' AutoTokenizer

With ``format="llama"`` names, shapes and config.json are those of transformers' ``LlamaForCausalLM``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from workbench.config import ConfigError
from workbench.contract import VariantConfig
from workbench.data.preparation import DOCUMENT_SYMBOL
from workbench.files import write_json
from workbench.model import LanguageModel, ModelConfig
from workbench.pretrained.llama import LlamaConfig, from_llama, to_llama
from workbench.pretrained.tensors import (
    CONFIG,
    INDEX,
    WEIGHTS,
    check_tensors,
    in_file,
    read_json_file,
    read_tensors,
    write_tensors,
)

FORMAT = 1
"""Raised when a reader of today could not read the folders of tomorrow."""
SHARD_BYTES = 5_000_000_000
"""Largest file of weights; Hugging Face's own limit for long."""
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def save(
    model: LanguageModel,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    format: Literal["workbench", "llama"] = "workbench",
    dtype: Literal["fp32", "bf16"] = "fp32",
    shard_bytes: int = SHARD_BYTES,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` into ``folder``, whole or not at all. An export that is there already is replaced.

    Args:
        model: fp32; any device.
        tokenizer: of the data it was trained on.
        format: ``llama`` for software that knows Llama and not us; plain Llama-style models only.
        dtype: of the stored weights. bf16 halves the folder and rounds every weight to 8 significant bits.
        shard_bytes: largest file of weights, in bytes.
        provenance: where the model comes from, kept in config.json as it is; ``context`` is its training context.

    Returns:
        the folder.

    Raises:
        ConfigError: when the folder holds anything but an export, or the model cannot be written in this format.
    """
    if dtype not in DTYPES:
        raise ConfigError.at("dtype", got=dtype, expected=" or ".join(DTYPES))
    if format not in ("workbench", "llama"):
        raise ConfigError.at("format", got=format, expected="workbench or llama")
    config, tensors = model.config, model.state_dict()
    provenance = dict(provenance or {})
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    # transformers 4 reads torch_dtype, 5 dtype
    stored = str(DTYPES[dtype]).removeprefix("torch.")
    about: dict[str, Any] = {
        "bos_token_id": symbol,
        "eos_token_id": symbol,
        "dtype": stored,
        "torch_dtype": stored,
        "workbench": {"format": FORMAT, "provenance": provenance},
    }
    if format == "llama":
        about = LlamaConfig.of(config).model_dump(mode="json", exclude_none=True) | about
        if "context" in provenance:
            about["max_position_embeddings"] = provenance["context"]
        tensors = to_llama(config, tensors)
    else:
        about = {
            "architectures": ["WorkbenchLanguageModel"],
            "model_type": "workbench",
            "vocab_size": config.vocabulary,
        } | about
        about["workbench"]["model"] = pinned(config).plain()
    with _taking_the_place_of(Path(folder)) as new:
        write_json(new / CONFIG, about)
        _with_document_symbol(tokenizer).save(str(new / TOKENIZER))
        write_json(
            new / TOKENIZER_CONFIG,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **({} if symbol is None else {"bos_token": DOCUMENT_SYMBOL, "eos_token": DOCUMENT_SYMBOL}),
            },
        )
        write_tensors(tensors, new, DTYPES[dtype], shard_bytes, exact=dict(model.named_buffers()))
    return Path(folder)


def load(folder: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """The model and the tokenizer of an exported folder, or of a plain Llama checkpoint with a ``tokenizer.json``.

    The weights are those stored, in their stored type; a Llama checkpoint's become fp32 (see :func:`import_llama`).

    Raises:
        ConfigError: naming a missing or damaged file, an unknown variant or setting, or the tensors that do not fit.
    """
    folder = _there(folder)
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    config, tensors = read(folder)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    assert config.vocabulary
    if highest >= config.vocabulary:
        raise ConfigError.at(
            str(folder / TOKENIZER),
            got=f"token id {highest}",
            expected=f"ids below the model's vocabulary of {config.vocabulary}",
        )
    return build(config, tensors), tokenizer


def _there(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise ConfigError.at(
            str(folder),
            got="no such folder",
            expected="an export, or a plain Llama checkpoint",
            do="`workbench export` writes one from a run.",
        )
    return Path(folder)


def import_llama(folder: str | Path) -> LanguageModel:
    """A plain Llama-style checkpoint (config.json, safetensors) as ``full`` attention and ``swiglu``; fp32.

    ``model.config`` is its ModelConfig. An rms_norm_eps that is not ours is honoured by a rescaling of weights
    (:func:`workbench.pretrained.llama.from_llama`). max_position_embeddings, dropout and initialisation say nothing
    about the function, and are ignored.

    Raises:
        ConfigError: naming the fields that we cannot express, missing files, or the tensors that do not fit.
    """
    return build(*_read_llama(Path(folder)))


def read(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the weights, by our parameter names, of an exported folder or a plain Llama checkpoint.

    Raises:
        ConfigError: as :func:`load`.
    """
    folder = _there(folder)
    about = read_json_file(folder / CONFIG)
    kind = about.get("model_type")
    if kind == "llama":
        return _read_llama(folder)
    held = about.get("workbench")
    if kind != "workbench" or not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ConfigError.at(
            f"{folder / CONFIG}: model_type",
            got=kind if kind != "workbench" else f"format {held and held.get('format')}",
            expected=f"workbench (format {FORMAT}) or llama",
        )
    try:
        config = ModelConfig.parse(held.get("model"))
    except ConfigError as error:
        raise in_file(error.under("workbench.model"), folder / CONFIG) from None
    tensors = read_tensors(folder)
    check_against(config, tensors, folder)
    return config, tensors


def check_against(config: ModelConfig, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise one ConfigError that names the tensors that a model of ``config`` lacks, does not know or shapes differently."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LanguageModel(config).state_dict().items()}
    check_tensors(tensors, shapes, where)


def build(config: ModelConfig, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """The model whose parameters are these very tensors, in evaluation mode."""
    model = LanguageModel(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def pinned(config: ModelConfig) -> ModelConfig:
    """The same model with every variant's settings written out, so that a later change of a default changes nothing."""

    def named(pattern: str, variants: Sequence[VariantConfig], at: Collection[int] = ()) -> dict[str, Any]:
        """Settings of the names of a pattern."""
        tile = pattern.split()
        return {tile[i % len(tile)]: variant.plain() for i, variant in enumerate(variants) if i not in at}

    layers = config.layers
    mixing, feeding = [layer.mixer for layer in layers], [layer.feedforward for layer in layers]
    further: dict[str, Any] = {"embedding": config.embedding_config.plain()}
    if config.mtp is not None and config.mtp_layer is not None:
        further["mtp"] = {**config.mtp.plain(), **config.mtp_layer.plain()}
    return config.changed(
        **further,
        mixers={**config.mixers, **named(config.pattern, mixing, config.at)},
        at={i: mixing[i].plain() for i in config.at},
        feedforwards={
            **config.feedforwards,
            **named(config.feedforward, feeding, config.feedforward_at),
            **named(config.shortcut, config.shortcuts),
        },
        feedforward_at={i: feeding[i].plain() for i in config.feedforward_at},
    )


def _read_llama(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    about = read_json_file(folder / CONFIG)
    try:
        llama = LlamaConfig.parse(about)
        llama.ours()
    except ConfigError as error:
        raise in_file(error, folder / CONFIG) from None
    return from_llama(llama, read_tensors(folder), folder)


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ConfigError.at(str(path), got="no such file", expected="JSON that the `tokenizers` library wrote")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError.at(str(path), got=str(error), expected="JSON that the `tokenizers` library wrote") from None
    if tokenizer.token_to_id(DOCUMENT_SYMBOL) is not None:
        tokenizer.encode_special_tokens = True  # as in training: the symbol written out in a text is text
    return tokenizer


def _with_document_symbol(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that puts the document symbol in front of a text, where it has one."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    symbol = copy.token_to_id(DOCUMENT_SYMBOL)
    if symbol is not None:
        copy.post_processor = processors.TemplateProcessing(
            single=f"{DOCUMENT_SYMBOL} $A", special_tokens=[(DOCUMENT_SYMBOL, symbol)]
        )
    return copy


@contextlib.contextmanager
def _taking_the_place_of(folder: Path) -> Iterator[Path]:
    """A new folder, written beside ``folder`` and renamed to it when the block ends well.

    Raises:
        ConfigError: when ``folder`` holds anything but an export.
    """
    folder = folder.resolve()
    refusal = _not_an_export(folder)
    if refusal:
        raise ConfigError.at(
            "folder",
            got=f"{folder}, which {refusal}",
            expected="a new folder, an empty one, or an earlier export",
            do="Choose another folder; nothing was written.",
        )
    new, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():  # a folder that is not empty cannot be renamed over
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _not_an_export(folder: Path) -> str:
    """Why ``folder`` must not be replaced; empty where it may be."""
    if not folder.exists():
        return ""
    if not folder.is_dir():
        return "is a file"
    names = {path.name for path in folder.iterdir()}
    others = {
        n
        for n in names
        if n not in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, INDEX)
        and not (n.startswith("model-") and n.endswith(".safetensors"))
    }
    if others:
        return f"holds {min(others)!r}"
    if names and not isinstance(_quietly(folder / CONFIG).get("workbench"), dict):
        return "holds a model that was not exported from here"
    return ""


def _quietly(path: Path) -> dict[str, Any]:
    try:
        return read_json_file(path)
    except ConfigError:
        return {}
