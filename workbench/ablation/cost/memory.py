"""What autograd saves for the backward pass, estimated without computing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from workbench.compat import storage_key
from workbench.contract import AuxOutputs
from workbench.model import LanguageModel
from workbench.training.config import RunConfig

__all__ = ["activation_bytes"]


def activation_bytes(config: RunConfig) -> int:
    """Bytes that autograd saves for one micro-batch's backward pass, traced on the meta device without computing.

    Our estimate: tensors saved by the forward pass, each storage once, parameters left out; with ``recompute`` the
    inputs of all blocks and the activations of an average block, which exist while it is recomputed. Temporaries of
    single operations are not included. Compiled code saves much less (full 340M, 16 × 4096, bf16: 145 GiB by this
    estimate, 66 GiB of total peak memory measured on an H100).
    """
    if config.training.recompute:
        plain = config.changed(training=config.training.changed(recompute=False))
        return _saved_bytes(config) + _saved_bytes(plain) // len(config.model.layers)
    return _saved_bytes(config)


class _Attention(torch.autograd.Function):
    """Saves for the backward pass what fused kernels save."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        raise AssertionError("nothing is computed on the meta device")


class _FusedAttention(TorchFunctionMode):
    """Fused attention for the meta device, where torch has none: scores are not saved."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def _saved_bytes(config: RunConfig) -> int:
    training = config.training
    # spans of one configuration save the same: one of each is traced
    counts = list(Counter(config.model.spans).items()) if config.model.repeats else [(s, 1) for s in config.model.spans]
    with torch.device("meta"):
        model = LanguageModel(config.model.with_spans([span for span, _ in counts]))
        model.recompute = training.recompute
        pairs = len(model.shortcuts) > 0
        ends = (
            model.shortcuts
            if model.config.shortcut_parity and pairs
            else model.blocks[1 if pairs else 0 :: 2 if pairs else 1]
        )
        tokens = torch.zeros(training.batch_size, training.context, dtype=torch.long)
        parameters = {storage_key(parameter.untyped_storage()) for parameter in model.parameters()}
        saved: dict[int, int] = {}
        alive: list[Any] = []  # keys of meta storages are unique only while the storages exist
        times = [1]  # what is saved from the end of one span to the end of the next counts for all spans of its kind
        for module, count in zip((model.embedding, *ends), (*(count for _, count in counts), 1)):
            module.register_forward_hook(lambda *_, count=count: times.append(count))

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            key = storage_key(storage)
            if key not in parameters and key not in saved:
                saved[key] = storage.nbytes() * times[-1]
                alive.append(storage)
            return tensor

        with (
            _FusedAttention(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"),
        ):
            model.loss(tokens, tokens, segments=torch.zeros_like(tokens), objective_aux=AuxOutputs())
    return sum(saved.values())
