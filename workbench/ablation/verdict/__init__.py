"""From measurements to a conclusion with its uncertainty."""
