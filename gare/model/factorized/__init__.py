"""The exact factorised form: what Δ needs of a video is computed once, see docs/design/factorized.md."""
