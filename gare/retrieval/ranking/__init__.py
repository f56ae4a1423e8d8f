"""Scores and exact ranks of a split, block by block, and what is counted of them."""
