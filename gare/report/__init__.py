"""Everything that is drawn: curves, retrievals, contact sheets, tables."""
