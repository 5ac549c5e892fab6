"""The distillation run: experiments, stages, losses, training, evaluation, report."""
