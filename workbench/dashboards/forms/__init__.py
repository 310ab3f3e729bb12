"""Forms that write configuration files."""
