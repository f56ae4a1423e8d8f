"""Studies: grids of settings and seeds, their paired differences with intervals, and their tables."""
