"""Encoders of pictures and words: CLIP's towers, the temporal transformer, adapters, the tokeniser."""
