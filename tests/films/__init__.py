"""Films whose truth is known, because they are made here: every picture carries its number.

- ``numbers``: a number drawn as black and white blocks, read back from a decoded picture
- ``film``: what players show of a film, and how one is encoded and written
- ``clocks``, ``tracks``, ``damage``, ``links``: the kinds, each drawn from a seed
- ``kinds``: all kinds by name
- ``judge``: what is asked of a film, and whether the answer is right
"""
