"""Frame and feature stores: Parquet parts, what counts of them, and reading them back."""
