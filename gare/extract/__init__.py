"""Extraction: compares stores with their collection and writes what is missing."""
