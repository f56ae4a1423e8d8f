"""All private interfaces of Ray that this project uses, as found in Ray 2.60.

``tests/cluster/test_compat.py`` fails when one of them vanishes.
"""

from __future__ import annotations

from typing import Any

#: Logger that warns that progress bars are off.
PROGRESS_LOGGER = "ray.data._internal.progress"


def resources_after_growth() -> dict[str, float]:
    """Returns the resources of an autoscaling cluster at its largest, as Ray's own libraries read them.

    Returns:
        Amounts by kind; empty if Ray does not say.
    """
    try:
        from ray._private.state import state

        return dict(state.get_max_resources_from_cluster_config() or {})
    except Exception:
        return {}


def address_on_this_machine() -> str:
    """Returns the address of the cluster that ``auto`` means; empty if there is none.

    Raises:
        ConnectionError: if there is none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address("auto") or ""


def table_of_object(content: Any) -> Any:
    """Returns a table with one cell that holds any object; Ray pickles it, like all that it sends."""
    import pyarrow as pa
    from ray.data.extensions import ArrowPythonObjectArray

    return pa.table({"content": ArrowPythonObjectArray.from_objects([content])})
