"""The words for each fact. Words of one entry mean the same, so that they make the same claim."""

from __future__ import annotations

COLORS: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
}

BACKDROPS: dict[str, tuple[str, ...]] = {
    "black": ("black",),
    "gray": ("gray", "grey"),
    "brown": ("brown",),
    "navy": ("navy", "dark blue"),
    "beige": ("beige", "cream"),
    "teal": ("teal", "turquoise"),
    "lavender": ("lavender", "light purple"),
}

#: A caption says where: filled with a backdrop.
PLACES = (
    "on a {} background",
    "against a {} backdrop",
    "in front of a {} wall",
    "over a {} surface",
)

SHAPE_NAMES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
}

SIZES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}

_GOING = (("moves", "moving"), ("drifts", "drifting"), ("slides", "sliding"), ("glides", "gliding"))


def _going(*ways: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{says} {way}", f"{doing} {way}") for says, doing in _GOING for way in ways)


#: (third person, participle) for each motion.
MOTION_PHRASES: dict[str, tuple[tuple[str, str], ...]] = {
    "left": _going("left", "to the left", "from right to left"),
    "right": _going("right", "to the right", "from left to right"),
    "up": (*_going("up", "upwards"), ("rises", "rising")),
    "down": (*_going("down", "downwards"), ("sinks", "sinking")),
    "orbit": (
        ("moves in a circle", "moving in a circle"),
        ("goes round in circles", "going round in circles"),
        ("runs in a loop", "running in a loop"),
    ),
    "grow": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "shrink": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("contracts", "contracting")),
    "still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("rests in place", "resting in place"),
    ),
}
