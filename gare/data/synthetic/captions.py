"""Captions of a scene in several wordings, each with the claims it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gare.data.synthetic.caption_truth import Claims, ObjectClaim, Relation
from gare.data.synthetic.scene import Scene, SceneObject

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

#: Phrases for the background, filled with a backdrop's name.
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


NUM_CAPTIONS = 5
MIN_WORDS, MAX_WORDS = 8, 24
# Words and commas; a few words are two tokens, and 30 tokens are left beside the two markers.
_MAX_PIECES = 25
_MAX_DRAWS = 200


@dataclass(frozen=True)
class Caption:
    """A sentence and its claims.

    Attributes:
        text: lower-case English, 8 to 24 words.
        claims: its claims, as predicates over a scene.
    """

    text: str
    claims: Claims


def write_captions(scene: Scene, rng: np.random.Generator) -> tuple[Caption, ...]:
    """Writes NUM_CAPTIONS different captions, all true of the scene."""
    styles = _styles_for(scene)
    captions: list[Caption] = []
    for turn in range(_MAX_DRAWS):
        if turn % len(styles) == 0:
            order = rng.permutation(len(styles))
        caption = styles[order[turn % len(styles)]](_Writer(scene, rng))
        words = caption.text.split()
        fits = MIN_WORDS <= len(words) <= MAX_WORDS and len(words) + caption.text.count(",") <= _MAX_PIECES
        if fits and all(caption.text != other.text for other in captions):
            captions.append(caption)
        if len(captions) == NUM_CAPTIONS:
            return tuple(captions)
    raise AssertionError(f"no {NUM_CAPTIONS} captions in {_MAX_DRAWS} draws for {scene}")


class _Writer:
    """Writer of phrases about one scene, which collects their claims."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.claims = Claims(objects=())
        self._claimed: list[SceneObject] = []

    def one_of(self, words: tuple[str, ...]) -> str:
        return words[int(self.rng.integers(len(words)))]

    def shuffled(self) -> list[SceneObject]:
        return [self.scene.objects[i] for i in self.rng.permutation(len(self.scene.objects))]

    def noun(self, thing: SceneObject, article: str = "a", size_chance: float = 0.6) -> str:
        """Names an object by colour and shape, often by size, and adds these claims."""
        words = [self.one_of(COLORS[thing.color]), self.one_of(SHAPE_NAMES[thing.shape])]
        size = None
        if thing.size in SIZES and self.rng.random() < size_chance:
            size = thing.size
            words.insert(0, self.one_of(SIZES[size]))
        self._claimed.append(thing)
        claim = ObjectClaim(color=thing.color, shape=thing.shape, size=size)
        self.claims = replace(self.claims, objects=(*self.claims.objects, claim))
        if article == "a" and words[0][0] in "aeiou":
            article = "an"
        return " ".join([article, *words])

    def verb(self, thing: SceneObject, form: int = 0) -> str:
        """Writes the motion of an object that was named: form 0 "moves", form 1 "moving"."""
        phrases = MOTION_PHRASES[thing.motion]
        index = self._claimed.index(thing)
        objects = list(self.claims.objects)
        objects[index] = replace(objects[index], motion=thing.motion)
        self.claims = replace(self.claims, objects=tuple(objects))
        return phrases[int(self.rng.integers(len(phrases)))][form]

    def background(self) -> str:
        self.claims = replace(self.claims, background=self.scene.background)
        return self.one_of(BACKDROPS[self.scene.background])

    def place(self) -> str:
        return self.one_of(PLACES).format(self.background())

    def counted(self, phrase: str) -> str:
        self.claims = replace(self.claims, num_objects=len(self.scene.objects))
        return phrase

    def related(self, name: str, one: SceneObject, other: SceneObject) -> None:
        relation: Relation = (name, self._claimed.index(one), self._claimed.index(other))
        self.claims = replace(self.claims, relations=(*self.claims.relations, relation))

    def caption(self, text: str) -> Caption:
        return Caption(text, self.claims)


_Style = Callable[[_Writer], Caption]


def _styles_for(scene: Scene) -> tuple[_Style, ...]:
    if len(scene.objects) == 1:
        return _ALONE
    if len(scene.objects) == 3:
        return _THREE
    first, second = scene.objects
    if first.visible_s[1] < second.visible_s[1]:
        return (*_PAIR, _vanishes, _remains)
    if first.visible_s[0] < second.visible_s[0]:
        return (*_PAIR, _joined, _appears_later)
    if first.active_s[1] <= second.active_s[0]:
        return (*_PAIR, _first_then, _after)
    return (*_PAIR, _while, _at_once)


# Two objects, whatever the order of events.


def _list(w: _Writer) -> Caption:
    one, other = w.shuffled()
    return w.caption(f"{w.noun(one)} and {w.noun(other)} {w.place()}")


def _two_shapes(w: _Writer) -> Caption:
    one, other = w.shuffled()
    opening = w.counted(w.one_of(("two shapes", "a pair of shapes", "two objects")))
    return w.caption(f"{opening} {w.place()}, {w.noun(one)} and {w.noun(other)}")


def _both_move(w: _Writer) -> Caption:
    one, other = w.shuffled()
    return w.caption(f"{w.noun(one)} {w.verb(one)} and {w.noun(other)} {w.verb(other)} {w.place()}")


def _video_of(w: _Writer) -> Caption:
    one, other = w.shuffled()
    opening = w.one_of(("a video of", "a short clip of", "footage of", "this clip shows"))
    return w.caption(f"{opening} {w.noun(one)} {w.verb(one, 1)} and {w.noun(other)} {w.place()}")


def _background_first(w: _Writer) -> Caption:
    one, other = w.shuffled()
    opening = w.one_of(("on a {} background,", "the background is {} and", "in a {} scene,"))
    opening = opening.format(w.background())
    return w.caption(f"{opening} there is {w.noun(one)} {w.verb(one, 1)} and also {w.noun(other)}")


# Two objects in an order; scene.objects[0] is the one whose event comes first.


def _while(w: _Writer) -> Caption:
    one, other = w.shuffled()
    text = f"{w.noun(one)} {w.verb(one)} while {w.noun(other)} {w.verb(other)} {w.place()}"
    w.related("while", one, other)
    return w.caption(text)


def _at_once(w: _Writer) -> Caption:
    one, other = w.shuffled()
    opening = w.one_of(("at the same time,", "all at once,"))
    text = f"{opening} {w.noun(one)} {w.verb(one)} and {w.noun(other)} {w.verb(other)} {w.place()}"
    w.related("while", one, other)
    return w.caption(text)


def _first_then(w: _Writer) -> Caption:
    one, other = w.scene.objects
    link = w.one_of(("then", "and then", "afterwards"))
    text = f"first {w.noun(one)} {w.verb(one)}, {link} {w.noun(other)} {w.verb(other)} {w.place()}"
    w.related("moves_before", one, other)
    return w.caption(text)


def _after(w: _Writer) -> Caption:
    one, other = w.scene.objects
    link = w.one_of(("after", "only after", "once"))
    text = f"{w.noun(other)} {w.verb(other)} {link} {w.noun(one)} has finished moving {w.place()}"
    if one.motion in ("grow", "shrink"):
        text = text.replace("has finished moving", "has stopped " + w.verb(one, 1))
    w.related("moves_before", one, other)
    return w.caption(text)


def _joined(w: _Writer) -> Caption:
    one, other = w.scene.objects
    link = w.one_of(("is later joined by", "is there before", "is seen earlier than"))
    text = f"{w.noun(one)} {link} {w.noun(other)} {w.place()}"
    w.related("appears_before", one, other)
    return w.caption(text)


def _appears_later(w: _Writer) -> Caption:
    one, other = w.scene.objects
    link = w.one_of(("appears later", "shows up after a while", "comes into view later"))
    text = f"{w.noun(one)} {w.verb(one)} and {w.noun(other)} {link} {w.place()}"
    w.related("appears_before", one, other)
    return w.caption(text)


def _vanishes(w: _Writer) -> Caption:
    one, other = w.scene.objects
    link = w.one_of(("vanishes and leaves", "disappears and leaves", "fades away, leaving behind"))
    text = f"{w.noun(one)} {link} {w.noun(other)} {w.place()}"
    w.related("leaves_before", one, other)
    return w.caption(text)


def _remains(w: _Writer) -> Caption:
    one, other = w.scene.objects
    link = w.one_of(("remains after", "is left when", "is still there when"))
    gone = "is gone" if "when" in link else "has vanished"
    text = f"{w.noun(other)} {w.verb(other)} and {link} {w.noun(one)} {gone} {w.place()}"
    w.related("leaves_before", one, other)
    return w.caption(text)


# One object, and nothing else.


def _lone(w: _Writer) -> Caption:
    (one,) = w.scene.objects
    article = w.counted(w.one_of(("a single", "a lone", "only one", "just one")))
    return w.caption(f"{w.noun(one, article, 1)} {w.verb(one)} {w.place()}")


def _nothing_else(w: _Writer) -> Caption:
    (one,) = w.scene.objects
    ending = w.counted(w.one_of(("and nothing else is there", "all by itself", "on its own")))
    return w.caption(f"{w.noun(one, size_chance=1)} {w.verb(one)} {w.place()} {ending}")


def _video_of_one(w: _Writer) -> Caption:
    (one,) = w.scene.objects
    opening = w.one_of(("a video of", "a short clip of", "footage of", "this clip shows"))
    noun = w.noun(one, w.counted("a single"), 1)
    return w.caption(f"{opening} {noun} {w.verb(one, 1)} {w.place()}")


# Three objects.


def _three_listed(w: _Writer) -> Caption:
    one, other, third = w.shuffled()
    nouns = [w.noun(thing, size_chance=0.2) for thing in (one, other, third)]
    return w.caption(f"{nouns[0]}, {nouns[1]} and {nouns[2]} {w.place()}")


def _three_shapes(w: _Writer) -> Caption:
    one, other, third = w.shuffled()
    nouns = [w.noun(thing, size_chance=0) for thing in (one, other, third)]
    opening = w.counted(w.one_of(("three shapes", "a group of three", "three small objects")))
    if "small" in opening:
        w.claims = replace(w.claims, objects=tuple(replace(c, size="small") for c in w.claims.objects))
    return w.caption(f"{opening} {w.place()}, {nouns[0]}, {nouns[1]} and {nouns[2]}")


def _one_of_three_moves(w: _Writer) -> Caption:
    one, other, third = w.shuffled()
    noun, *others = (w.noun(thing, size_chance=0.1) for thing in (one, other, third))
    return w.caption(f"{noun} {w.verb(one)}, with {others[0]} and {others[1]} {w.place()}")


_ALONE: tuple[_Style, ...] = (_lone, _nothing_else, _video_of_one)
_PAIR: tuple[_Style, ...] = (_list, _two_shapes, _both_move, _video_of, _background_first)
_THREE: tuple[_Style, ...] = (_three_listed, _three_shapes, _one_of_three_moves)
