"""Several processes that run one job, and what ends them together."""
