"""Modules of the step evaluate."""
