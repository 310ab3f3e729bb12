"""How trials are run: plan, studies, workers, launchers."""
