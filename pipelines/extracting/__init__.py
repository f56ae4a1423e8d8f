"""Modules of the step extract."""
