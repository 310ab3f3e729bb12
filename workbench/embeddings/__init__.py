"""Embeddings: how token ids become vectors. Modules of this package that register one are found automatically."""

from workbench.contract import Cache, Cost, Embedding, EmbeddingConfig, embeddings

__all__ = ["Cache", "Cost", "Embedding", "EmbeddingConfig", "embeddings"]
