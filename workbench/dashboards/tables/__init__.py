"""The tables that several panels draw. Each takes a snapshot and has the same columns whether or not it has rows."""
