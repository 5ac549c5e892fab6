"""What a run takes on devices that need not be there: memory, time and hours, for `distill.plan`."""
