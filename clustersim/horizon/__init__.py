"""Days of training with failures: rates, checkpoints, restarts, spares, and the goodput that they leave."""
