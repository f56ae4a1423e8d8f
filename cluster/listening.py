"""On which addresses a local Ray listens."""

from __future__ import annotations

import os

#: Ray's own switch for machines that are no cluster; off it takes 127.0.0.1 for this node's address, as it
#: does by itself on macOS and Windows. Ray reads it when it is imported.
_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def listen_here_alone() -> None:
    """Makes a Ray that this process will start listen on this machine alone; to be called before its import.

    By default all of its processes (GCS, raylet, object manager, workers, driver, agents) listen on all
    addresses, held by the token alone, which travels unencrypted. A person's own setting wins.

    What this cannot do: the rendezvous of ``torch.distributed`` and gloo's connections between training
    workers listen on addresses of PyTorch's choice, without a password, for as long as a training runs.
    """
    os.environ.setdefault(_SWITCH, "0")
