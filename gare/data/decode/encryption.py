"""Detection of encrypted videos, which decoders take for damaged ones and turn into garbage.

Source: ISO/IEC 14496-12 section 8.12 (sample entry ``encv``; ``drmi`` is Apple's), the ASF specification's
section 3.14 (Content Encryption Object).
"""

from __future__ import annotations

import av

from gare.data.decode.file_kind import read_head
from gare.data.decode.mov_tracks import mov_tracks

#: Sample entries of MP4 and MOV with encrypted pictures.
_ENTRIES = frozenset((b"encv", b"drmi"))
#: Ids of the Content Encryption Object of ASF and of its extended form.
_ASF_OBJECTS = (
    bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e"),
    bytes.fromhex("14e68a292226174cb935dae07ee9289c"),
)


def is_encrypted(path: str, container: str, stream: av.VideoStream) -> bool:
    """True if a file says that the pictures of a stream are encrypted.

    Args:
        path: the file.
        container: short name of its container: mov, matroska, asf, …
        stream: a video stream of the file.
    """
    if container == "mov":
        return any(track.track_id == stream.id and track.entries & _ENTRIES for track in mov_tracks(path))
    if container == "matroska":
        return "enc_key_id" in stream.metadata
    head = read_head(path) if container == "asf" else None
    return any(name in (head or b"") for name in _ASF_OBJECTS)
