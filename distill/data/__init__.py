"""From records of rollouts to fixed-shape batches of rows."""
