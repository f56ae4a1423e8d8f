"""The exact factorised form: the video's part of Δ is computed once, see docs/design/factorized.md."""
