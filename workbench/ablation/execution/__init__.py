"""Carrying an ablation out: plan, studies, workers, trials, launchers."""
