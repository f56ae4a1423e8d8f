"""``make bench-gpu``: speed and memory on a GPU, part by part; ``python -m tests.benchmarks.gpu --help``."""
