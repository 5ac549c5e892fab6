"""The decoder: its configuration, layers and parameters, dense or mixture of experts."""
