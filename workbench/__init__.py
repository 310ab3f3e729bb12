"""An ablation workbench for language-model architectures."""
