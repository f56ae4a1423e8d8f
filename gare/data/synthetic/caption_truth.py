"""Captions as predicates over scenes, to compute if a caption is true of a video."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

from gare.data.synthetic.scene import Scene, SceneObject

#: Relations between two mentioned objects: (name, index of the one, index of the other).
#: "moves_before": the one has finished its motion when the other starts.
#: "appears_before": the other comes into view later than the one.
#: "leaves_before": the one is gone while the other is still in view.
#: "while": both do what they do at the same time, at least for a part.
Relation = tuple[str, int, int]


@dataclass(frozen=True)
class ObjectClaim:
    """A caption's claims about one object; None for a property that it does not mention.

    Attributes:
        color: key of OBJECT_COLORS.
        shape: one of SHAPES.
        size: "small" or "large".
        motion: one of MOTIONS.
    """

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None

    def matches(self, thing: SceneObject) -> bool:
        """Returns True if all claims hold of the object."""
        return (
            (self.color is None or self.color == thing.color)
            and (self.shape is None or self.shape == thing.shape)
            and (self.motion is None or self.motion == thing.motion)
            # An object that grows or shrinks is small at one time and large at another, so either word fits.
            and (self.size is None or self.size == thing.size or thing.size == "changing")
        )


@dataclass(frozen=True)
class Claims:
    """All claims of a caption.

    Attributes:
        objects: one entry for each mentioned object; each stands for a different object of the scene.
        background: key of BACKGROUND_COLORS, or None.
        num_objects: number of objects in the scene, or None if the caption does not say.
        relations: claims about the order of events; indices into ``objects``.
    """

    objects: tuple[ObjectClaim, ...]
    background: str | None = None
    num_objects: int | None = None
    relations: tuple[Relation, ...] = ()


def caption_is_true(claims: Claims, scene: Scene) -> bool:
    """Returns True if a caption with these claims is true of a scene.

    It is true if each mentioned object can be matched with a different object of the scene so that all claims
    hold.
    """
    if claims.background is not None and claims.background != scene.background:
        return False
    if claims.num_objects is not None and claims.num_objects != len(scene.objects):
        return False
    # Most pairs of a benchmark are rejected here, without the permutations.
    for claim in claims.objects:
        if not any(claim.matches(thing) for thing in scene.objects):
            return False
    return any(
        all(claim.matches(thing) for claim, thing in zip(claims.objects, chosen, strict=True))
        and all(_relation_holds(relation, chosen) for relation in claims.relations)
        for chosen in permutations(scene.objects, len(claims.objects))
    )


def _relation_holds(relation: Relation, chosen: tuple[SceneObject, ...]) -> bool:
    name, one_idx, other_idx = relation
    one, other = chosen[one_idx], chosen[other_idx]
    if name == "moves_before":
        return "still" not in (one.motion, other.motion) and one.active_s[1] <= other.active_s[0]
    if name == "appears_before":
        return one.visible_s[0] < other.visible_s[0]
    if name == "leaves_before":
        return one.visible_s[1] < other.visible_s[1]
    if name == "while":
        return one.active_s[0] < other.active_s[1] and other.active_s[0] < one.active_s[1]
    raise AssertionError(f"unknown relation {name}")
