"""Frame and feature stores: Parquet parts, the rows of them that count, and readers."""
