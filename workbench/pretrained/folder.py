"""A trained model as a folder in the layout of Hugging Face.

    config.json             architecture, vocabulary, the ModelConfig with every default filled in, provenance
    model.safetensors       weights by the names of LanguageModel, a tied head once; or shards and an index
    tokenizer.json          for the `tokenizers` library; puts the document symbol before a text, as training did
    tokenizer_config.json   for transformers' AutoTokenizer

With ``format="llama"`` names, shapes and config.json are those of transformers' ``LlamaForCausalLM``, with ``qwen3``
those of ``Qwen3ForCausalLM``. Checkpoints of these and other families (:mod:`workbench.pretrained.families`) are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from workbench.config import ConfigError, require
from workbench.contract import VariantConfig
from workbench.data.tokenizer import DOCUMENT_SYMBOL
from workbench.files import replacing_folder, write_json
from workbench.model import LanguageModel, ModelConfig
from workbench.model.folding import folded
from workbench.pretrained.families import families, read_checkpoint
from workbench.pretrained.families.llama import Llama
from workbench.pretrained.families.qwen3 import Qwen3
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
from workbench.pretrained.tokenizer import TOKENIZER, TOKENIZER_CONFIG, read_tokenizer, write_tokenizer

GENERATION_CONFIG = "generation_config.json"
CALIBRATION = "calibration.json"
"""Which key channels matter (:mod:`workbench.decoding.calibration`); a new export replaces it with the weights."""
WRITTEN: dict[str, type[Llama]] = {"llama": Llama, "qwen3": Qwen3}
"""Formats other than ours."""
FORMAT = 1
"""Version of the layout, for a reader that must refuse a later one."""
SHARD_BYTES = 5_000_000_000
"""Largest file of weights, for years the limit of Hugging Face."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def save(
    model: LanguageModel,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    format: Literal["workbench", "llama", "qwen3"] = "workbench",
    dtype: Literal["fp32", "bf16"] = "fp32",
    shard_bytes: int = SHARD_BYTES,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` into ``folder``, atomically. An earlier export in ``folder`` is replaced.

    Multipliers of a parametrisation are folded into the weights; the folder has a model of the standard one.

    Args:
        model: fp32; any device.
        tokenizer: of the data it was trained on.
        format: ``llama`` or ``qwen3`` (with ``qk_norm``) for software that reads these but not this layout; models of
            full attention and SwiGLU only.
        dtype: of the stored weights. bf16 halves the folder and rounds every weight to 8 significant bits.
        shard_bytes: largest file of weights, in bytes.
        provenance: origin of the model, stored in config.json as it is; ``context`` is its training context.

    Returns:
        the folder.

    Raises:
        ConfigError: when the folder contains anything but an export, or the model cannot be written in this format.
    """
    require(dtype in DTYPES, "dtype", got=dtype, expected=" or ".join(DTYPES))
    formats = ("workbench", *WRITTEN)
    require(format in formats, "format", got=format, expected=" or ".join(formats))
    config, tensors = folded(model.config, model.state_dict())
    provenance = dict(provenance or {})
    symbol = tokenizer.token_to_id(DOCUMENT_SYMBOL)
    ends = sorted(model.stop_tokens.union(() if symbol is None else (symbol,)))
    # transformers 4 reads torch_dtype, 5 dtype
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    fields: dict[str, Any] = {
        "bos_token_id": symbol,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        "workbench": {"format": FORMAT, "provenance": provenance},
    }
    if format in WRITTEN:
        family = WRITTEN[format].of(config)
        fields = family.fields() | fields
        if "context" in provenance:
            fields["max_position_embeddings"] = provenance["context"]
        tensors = family.write(tensors)
    else:
        architecture = {"architectures": ["WorkbenchLanguageModel"], "model_type": "workbench"}
        fields = architecture | {"vocab_size": config.vocabulary} | fields
        fields["workbench"]["model"] = explicit(config).plain()
    folder = Path(folder)
    _check_replaceable(folder)
    with replacing_folder(folder) as temporary:
        write_json(temporary / CONFIG, fields)
        write_tokenizer(tokenizer, temporary)
        write_tensors(tensors, temporary, DTYPES[dtype], shard_bytes, exact=dict(model.named_buffers()))
    return folder


def load(folder: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """The model and the tokenizer of an exported folder, or of another checkpoint with a ``tokenizer.json``.

    The weights are those stored, in their stored type; another checkpoint's become fp32 (see :func:`import_model`).

    Raises:
        ConfigError: naming a missing or damaged file, an unknown variant or setting, or the tensors that do not fit.
    """
    folder = _existing(folder)
    tokenizer = read_tokenizer(folder)
    config, tensors = read(folder)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    assert config.vocabulary
    require(
        highest < config.vocabulary,
        str(folder / TOKENIZER),
        got=f"token id {highest}",
        expected=f"ids below the model's vocabulary of {config.vocabulary}",
    )
    model = build(config, tensors)
    model.stop_tokens, model.folder = stop_tokens(folder), folder
    return model, tokenizer


def provenance(folder: str | Path) -> dict[str, Any]:
    """What an exported folder records of its origin: run, step, context of training. Of another checkpoint, its context
    alone.

    Raises:
        ConfigError: when there is no config.json.
    """
    fields = read_json_file(_existing(folder) / CONFIG)
    section = fields.get("workbench")
    recorded = section.get("provenance") if isinstance(section, dict) else None
    return dict(recorded) if recorded else {"context": fields.get("max_position_embeddings")}


def stop_tokens(folder: Path) -> frozenset[int]:
    """Ids that end a text, as config.json and generation_config.json name them (``eos_token_id``). Where
    config.json has no such field, it is transformers' default for the family.

    Raises:
        ConfigError: when one is no number.
    """
    ids: set[int] = set()
    for file in (CONFIG, GENERATION_CONFIG):
        if not (folder / file).is_file():
            continue
        fields = read_json_file(folder / file)
        kind = fields.get("model_type") if file == CONFIG else None
        default = families[kind].default_end if isinstance(kind, str) and kind in families else None
        value = fields.get("eos_token_id", default)
        values = value if isinstance(value, list) else [] if value is None else [value]
        require(
            all(isinstance(item, int) and not isinstance(item, bool) for item in values),
            f"{folder / file}: eos_token_id",
            got=value,
            expected="a token id, or a list of them",
        )
        ids.update(values)
    return frozenset(ids)


def import_model(folder: str | Path) -> LanguageModel:
    """A checkpoint of one of the families (config.json, safetensors), without its tokenizer; fp32.

    ``model.config`` is its ModelConfig. Another rms_norm_eps than this workbench's is absorbed into the weights
    (:func:`workbench.pretrained.families.read_checkpoint`). Dropout and initialisation do not affect the function and
    are ignored.

    Raises:
        ConfigError: naming the fields that this workbench cannot express, missing files, or tensors that do not fit.
    """
    folder = _existing(folder)
    model = build(*read(folder))
    model.stop_tokens, model.folder = stop_tokens(folder), folder
    return model


def read(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the weights, by our parameter names, of an exported folder or of a checkpoint of one of the
    families.

    Raises:
        ConfigError: as :func:`load`.
    """
    folder = _existing(folder)
    fields = read_json_file(folder / CONFIG)
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in families:
        return _read_family(folder, {**fields, "kind": model_type})
    section = fields.get("workbench")
    version = section.get("format") if isinstance(section, dict) else None
    require(
        model_type == "workbench" and version == FORMAT,
        f"{folder / CONFIG}: model_type",
        got=f"format {version}" if model_type == "workbench" else model_type,
        expected=f"workbench (format {FORMAT}) or one of {', '.join(families)}",
    )
    try:
        config = ModelConfig.parse(fields["workbench"].get("model"))
    except ConfigError as error:
        raise in_file(error.under("workbench.model"), folder / CONFIG) from None
    tensors = read_tensors(folder)
    check_against(config, tensors, folder)
    return config, tensors


def check_against(config: ModelConfig, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Check that ``tensors`` are those of a model of ``config``.

    Args:
        source: folder of the tensors, for messages.

    Raises:
        ConfigError: naming the tensors that are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LanguageModel(config).state_dict().items()}
    check_tensors(tensors, shapes, source)


def build(config: ModelConfig, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """The model whose parameters are ``tensors``, without a copy, in evaluation mode."""
    model = LanguageModel(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def explicit(config: ModelConfig) -> ModelConfig:
    """The same model with every variant's settings written out, independent of later changes of defaults."""

    def by_name(pattern: str, variants: Sequence[VariantConfig], skip: Collection[int] = ()) -> dict[str, Any]:
        """Settings of every name of a pattern, without the layers in ``skip``, which override them."""
        tile = pattern.split()
        return {tile[i % len(tile)]: variant.plain() for i, variant in enumerate(variants) if i not in skip}

    mixing, feeding = [layer.mixer for layer in config.layers], [layer.feedforward for layer in config.layers]
    changes: dict[str, Any] = {"embedding": config.embedding_config.plain()}
    if config.mtp is not None and config.mtp_layer is not None:
        changes["mtp"] = {**config.mtp.plain(), **config.mtp_layer.plain()}
    return config.changed(
        **changes,
        mixers={**config.mixers, **by_name(config.pattern, mixing, config.at)},
        at={i: mixing[i].plain() for i in config.at},
        feedforwards={
            **config.feedforwards,
            **by_name(config.feedforward, feeding, config.feedforward_at),
            **by_name(config.shortcut, config.shortcuts),
        },
        feedforward_at={i: feeding[i].plain() for i in config.feedforward_at},
    )


def _existing(folder: str | Path) -> Path:
    require(
        Path(folder).is_dir(),
        str(folder),
        got="no such folder",
        expected="an export, or a checkpoint of another family",
        do="`workbench export` writes one from a run.",
    )
    export = "workbench export {} exports/{}".format
    for file, kind, do in (
        ("ablation.json", "an ablation", export(f"{folder} --best", Path(folder).name)),
        ("run.json", "a training run", export(folder, Path(folder).name)),
    ):
        require(
            (Path(folder) / CONFIG).exists() or not (Path(folder) / file).exists(),
            str(folder),
            got=kind,
            expected="an export, or a checkpoint of another family",
            do=f"Export a model first: {do}",
        )
    return Path(folder)


def _read_family(folder: Path, fields: dict[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    try:
        family = families[fields["kind"]](families.parse(fields))
        family.model()
    except ConfigError as error:
        raise in_file(error, folder / CONFIG) from None
    return read_checkpoint(family, read_tensors(folder), folder)


def _check_replaceable(folder: Path) -> None:
    """Check that nothing but an export would be lost.

    Raises:
        ConfigError: when ``folder`` is a file, or contains anything else.
    """
    folder = folder.resolve()
    reason = ""
    if folder.exists() and not folder.is_dir():
        reason = "is a file"
    elif folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        ours = {CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, INDEX, CALIBRATION}
        shards = {name for name in names if name.startswith("model-") and name.endswith(".safetensors")}
        if names - ours - shards:
            reason = f"contains {min(names - ours - shards)!r}"
        elif names and not _is_export(folder):
            reason = "contains a model that was not exported from here"
    require(
        not reason,
        "folder",
        got=f"{folder}, which {reason}",
        expected="a new folder, an empty one, or an earlier export",
        do="Choose another folder; nothing was written.",
    )


def _is_export(folder: Path) -> bool:
    try:
        return isinstance(read_json_file(folder / CONFIG).get("workbench"), dict)
    except ConfigError:
        return False
