"""Bringing stores up to their collection: what is left to do, and who writes it."""
