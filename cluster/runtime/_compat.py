"""Interfaces of Ray that it does not promise, all that are used, as seen in Ray 2.60.

``tests/cluster/test_compat.py`` fails when one of them vanishes.
"""

from __future__ import annotations

from typing import Any

#: Warns that progress bars are off.
PROGRESS_LOGGER = "ray.data._internal.progress"


def resources_after_growth() -> dict[str, float]:
    """Resources that an autoscaling cluster can have in the end, as Ray's own libraries ask for them.

    Returns:
        Amounts by kind; empty where Ray does not say.
    """
    try:
        from ray._private.state import state

        return dict(state.get_max_resources_from_cluster_config() or {})
    except Exception:
        return {}


def table_of_object(content: Any) -> Any:
    """A table of one cell, which holds any object; Ray pickles it, as it does all that it sends."""
    import pyarrow as pa
    from ray.data.extensions import ArrowPythonObjectArray

    return pa.table({"content": ArrowPythonObjectArray.from_objects([content])})
