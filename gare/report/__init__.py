"""Pictures for people: curves, retrievals, contact sheets, tables."""
