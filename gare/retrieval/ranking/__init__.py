"""Scores and exact ranks of a split, block by block, and metrics from them."""
