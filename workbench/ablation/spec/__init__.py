"""What an ablation is: fields and their checks."""
