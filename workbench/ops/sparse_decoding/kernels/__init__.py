"""Triton kernels of sparse decoding: five launches from a query to its output, lengths read on the device.
Arguments and results as in :mod:`workbench.ops.sparse_decoding.torch`.

:mod:`.blocks`, :mod:`.weights`  scores of blocks, or of tokens per head and their weights; the program of a group that
                                 ends last chooses among them (:mod:`.choice`). :mod:`.indexer`: by learned scores.
:mod:`.attention`                partial attention over parts of the chosen tokens; their combination.
:mod:`.extend`, :mod:`.reads`    what a new token adds to the indices; what a step read.

To combine in the program that ends last was slower than another launch, and so was programmatic dependent launch, by 0
to 19 % of the whole (H200, Triton 3.6).

"The program that ends last" is found by counting arrivals (``tickets``); it resets the counter. What it computes does
not depend on which program it is, so results are bitwise reproducible.

Products have the heads of a group as their first 16 to 64 rows, which selects the instructions of Ampere (``mma``): on
Hopper, ``wgmma`` needs 64 rows.

Naming in the kernels, as in flash-linear-attention: ``i_`` program indices, ``o_`` offsets of a tile, ``m_`` masks,
``b_`` tiles in registers; upper-case sizes. Legend as in the package; J entries of a list of blocks.
"""

from workbench.ops.sparse_decoding.kernels.attention import attention
from workbench.ops.sparse_decoding.kernels.blocks import minmax_blocks
from workbench.ops.sparse_decoding.kernels.choice import select
from workbench.ops.sparse_decoding.kernels.common import LAUNCH
from workbench.ops.sparse_decoding.kernels.extend import extend_codes, extend_means, extend_minmax
from workbench.ops.sparse_decoding.kernels.indexer import indexer_blocks, indexer_tokens
from workbench.ops.sparse_decoding.kernels.reads import read_numbers
from workbench.ops.sparse_decoding.kernels.weights import channel_tokens, mean_blocks

__all__ = [
    "LAUNCH",
    "attention",
    "channel_tokens",
    "extend_codes",
    "extend_means",
    "extend_minmax",
    "indexer_blocks",
    "indexer_tokens",
    "mean_blocks",
    "minmax_blocks",
    "read_numbers",
    "select",
]
