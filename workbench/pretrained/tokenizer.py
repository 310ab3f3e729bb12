"""The tokenizer of an exported folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, processors

from workbench.data.tokenizer import DOCUMENT_SYMBOL, read
from workbench.files import write_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer`` for the ``tokenizers`` library and for transformers' ``AutoTokenizer``.

    The written one puts the document symbol before a text, as training did, where it has the symbol.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    symbol = copy.token_to_id(DOCUMENT_SYMBOL)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if symbol is not None:
        copy.post_processor = processors.TemplateProcessing(
            single=f"{DOCUMENT_SYMBOL} $A", special_tokens=[(DOCUMENT_SYMBOL, symbol)]
        )
        config |= {"bos_token": DOCUMENT_SYMBOL, "eos_token": DOCUMENT_SYMBOL}
        config["split_special_tokens"] = True  # as in training: the symbol written out in a text is text
    copy.save(str(folder / TOKENIZER))
    write_json(folder / TOKENIZER_CONFIG, config)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of ``folder``.

    Raises:
        ConfigError: when the file is missing, or the ``tokenizers`` library cannot read it.
    """
    path = str(folder / TOKENIZER)
    tokenizer = read(path, field=path)
    if tokenizer.token_to_id(DOCUMENT_SYMBOL) is not None:
        tokenizer.encode_special_tokens = True  # as in training: the symbol written out in a text is text
    return tokenizer
