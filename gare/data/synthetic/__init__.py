"""The generated benchmark: seeded videos of moving coloured shapes, each with several captions."""

from gare.data.synthetic.benchmark_plan import PlannedClip, ambiguous_fraction, plan_benchmark
from gare.data.synthetic.caption_truth import Claims, ObjectClaim, caption_is_true
from gare.data.synthetic.captions import Caption, write_captions
from gare.data.synthetic.generate import SyntheticBenchmark, SyntheticClip, generate_benchmark
from gare.data.synthetic.render import render_frame
from gare.data.synthetic.scene import Scene, SceneObject, draw_scene

__all__ = [
    "Caption",
    "Claims",
    "ObjectClaim",
    "PlannedClip",
    "Scene",
    "SceneObject",
    "SyntheticBenchmark",
    "SyntheticClip",
    "ambiguous_fraction",
    "caption_is_true",
    "draw_scene",
    "generate_benchmark",
    "plan_benchmark",
    "render_frame",
    "write_captions",
]
