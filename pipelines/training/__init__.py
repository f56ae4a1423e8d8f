"""Pieces of the step train."""
