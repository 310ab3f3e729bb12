"""What an ablation costs before anything runs."""
