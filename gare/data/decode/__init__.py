"""Decoding of videos to frames: probing a file, choosing a clip's pictures, and decoding them."""
