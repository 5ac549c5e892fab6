"""One update: packed rows, loss, gradients, optimiser, and the checkpoints between them."""
