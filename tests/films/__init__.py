"""Generated films with known truth: every picture shows its own number.

- ``numbers``: a number drawn as black and white blocks, read back from a decoded picture
- ``film``: what players show of a film, and how one is encoded and written
- ``clocks``, ``tracks``, ``damage``, ``links``: the kinds, each drawn from a seed
- ``kinds``: all kinds by name
- ``judge``: the requests made of a film, and the check of the answers
"""
