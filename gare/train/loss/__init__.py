"""The loss: its terms, their computation block by block on all workers, and its gradient."""
