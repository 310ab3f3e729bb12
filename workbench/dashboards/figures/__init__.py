"""What the figures of several panels share."""
