"""Decoding: text from a trained model, and the policies that decide which part of the caches a step reads.

    model, tokenizer = load("exports/mine")
    engine = Engine(model, tokenizer, policy="dense")
    print(engine.generate(["def main("], Sampling(max_tokens=64, temperature=0.8, seed=1)).texts[0])

A policy with settings: ``policy={"kind": "two_level", "tokens": 512}``; what its steps read is in
``generation.metrics.reads``. :func:`workbench.pretrained.load` reads an exported folder;
:data:`workbench.decoding.policy.policies` has the policies by name.
"""

from workbench.decoding.engine import Engine, Generation, Metrics, Stream, TextStream, encode_prompt
from workbench.decoding.policy import Policy, PolicyConfig
from workbench.decoding.reads import ReadLog
from workbench.decoding.step import Sampling

__all__ = [
    "Engine",
    "Generation",
    "Metrics",
    "Policy",
    "PolicyConfig",
    "ReadLog",
    "Sampling",
    "Stream",
    "TextStream",
    "encode_prompt",
]
