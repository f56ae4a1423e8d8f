"""Results of an evaluation: metrics, tables of queries, comparisons."""
