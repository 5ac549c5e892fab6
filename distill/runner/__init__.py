"""What the command `distill.run` does, from a file and its overrides to a finished run directory."""
