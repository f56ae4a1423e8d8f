"""Model test of jobs that write one store and are stopped and resumed between any two storage operations."""
