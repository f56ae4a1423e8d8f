"""The loss: what the workers share of it, block by block, and its gradient."""
