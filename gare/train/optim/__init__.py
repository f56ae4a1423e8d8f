"""Optimisers, their schedules and precisions."""
