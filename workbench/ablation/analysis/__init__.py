"""What is asked of finished ablations: power, comparison, diagnostics, archives."""
