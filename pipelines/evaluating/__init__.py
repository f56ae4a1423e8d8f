"""Pieces of the step evaluate."""
