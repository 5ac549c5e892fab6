"""What the teacher says about a position, how it is computed, and where it is kept."""
