"""The report of an ablation as one HTML file."""
