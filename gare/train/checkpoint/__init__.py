"""Checkpoints: their files, checksums, index, and the model that a run starts with."""
