"""Pieces of the step extract."""
