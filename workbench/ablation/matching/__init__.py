"""Budget matching and what an ablation costs."""
