"""Modules of the step train."""
