"""Embeddings: how token ids become vectors. A file here that registers one is found by itself."""

from workbench.contract import Cache, Cost, Embedding, EmbeddingConfig, embeddings

__all__ = ["Cache", "Cost", "Embedding", "EmbeddingConfig", "embeddings"]
