"""Accepted containers: those that hold the pictures themselves, not those that name other files.

Otherwise a playlist of 90 bytes from a stranger could put private videos of this machine, or content of the
network, into the store. PyAV gets the list of allowed demuxers; files that it refuses reach no other decoder.
decord and torchcodec have their own FFmpeg without such a list, and could take the same bytes for another
format. FFmpeg's demuxers that open further files recognise theirs by text at the start, by text anywhere
before the first zero byte, or by a name pattern of pictures (``frame%03d.jpg``). ``names_other_files`` looks
for all three before anything is opened. Folder names count as patterns, too: a file in ``50%done`` is read by
the demuxer that its first bytes determine, and only by PyAV.
"""

from __future__ import annotations

import re
from pathlib import PurePath

from gare.data.decode.file_kind import leading_text, read_head

_FILES = (
    "mov matroska avi mpegts mpeg flv live_flv kux asf asf_o ogg mxf gxf rm ivr dv nut ivf wtv nsv swf "
    "nuv pva ty dhav lmlm4 lxf mtv roq smk bink flic film_cpk ipmovie vivo yuv4mpegpipe iv8 mods thp"
)
_BARE_STREAMS = (
    "h261 h263 h264 hevc vvc m4v mpegvideo mjpeg mjpeg_2000 mpjpeg ingenient av1 obu evc vc1 vc1test "
    "dirac dnxhd cavsvideo avs2 avs3 apv"
)
#: Several pictures are a video; one is a video of one picture.
_PICTURE_FILES = (
    "gif apng jpegxl_anim gif_pipe jpeg_pipe png_pipe webp_pipe bmp_pipe tiff_pipe ppm_pipe pgm_pipe "
    "pbm_pipe pam_pipe j2k_pipe jpegls_pipe jpegxl_pipe exr_pipe dpx_pipe psd_pipe qoi_pipe sgi_pipe"
)
#: Sound formats, opened only to report that they hold no pictures.
_SOUNDS = "mp3 wav w64 flac aac ac3 eac3 dts amr aiff caf ape au wv tta"
#: FFmpeg's names of the demuxers that may read a file. None of them opens another file; MOV would with
#: ``enable_drefs``, which is off by default.
DEMUXERS = frozenset(" ".join((_FILES, _BARE_STREAMS, _PICTURE_FILES, _SOUNDS)).split())
#: The same in words, for messages.
ACCEPTED = (
    "one whole file with its pictures in it: MP4, MOV, Matroska, WebM, AVI, MPEG-TS, MPEG-PS, FLV, WMV, Ogg, "
    "MXF, GIF, …"
)
#: Most bytes that FFmpeg reads to recognise a format.
_PROBE_BYTES = 1 << 20

#: First bytes, in lower case, of text that names other files; the first three are demuxers of FFmpeg, people
#: save the others in place of a video.
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"#extm3u", "an HLS or M3U playlist"),
    (b"ffconcat", "a script for joining files (concat)"),
    (b"# vobsub index file", "an index of subtitles (VobSub)"),
    (b"v=0", "the description of a network stream (SDP)"),
    (b"[playlist]", "a playlist (PLS)"),
    (b"[reference]", "a playlist (ASF)"),
    (b"<asx", "a playlist (ASX)"),
    (b"<smil", "a playlist (SMIL)"),
    (b"rtsptext", "a link to a network stream (QuickTime)"),
)
#: Marks of such files anywhere in the text.
_MARKS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"<mpd", re.IGNORECASE), "a DASH manifest"),
    (re.compile(rb"<compositionplaylist", re.IGNORECASE), "a playlist (IMF)"),
    (re.compile(rb"^c=IN IP", re.MULTILINE), "the description of a network stream (SDP)"),
    (re.compile(rb"\A\s*(?:#[^\n]*\n\s*)*file\s+'", re.IGNORECASE), "a script for joining files (concat)"),
    (re.compile(rb"\A<\?xml[^>]*>\s*<(?:playlist|smil|asx)\b", re.IGNORECASE), "a playlist (XML)"),
)
#: Names that FFmpeg's image2 demuxer takes for many files, if they have the ending of a picture.
_PATTERN = re.compile(r"%(?:\d*d|[*?\[{])")
_PICTURE_ENDINGS = (
    "jpeg jpg jps mpo ljpg jls jxl jxs j2c j2k jp2 jpc png pns mng ppm pnm pgm pgmyuv pbm pam pfm phm pgx "
    "bmp tga tif tiff dng sgi ptx pcd pcx pic pct pict sun ras rs im1 im8 im24 im32 sunras gif ico webp "
    "xbm xpm xwd exr dpx dds cri crw hdr qoi svg svgz psd raw y vbn wbmp gem img ximg timg avif pix "
    "mpg1-img mpg2-img mpg4-img"
)
_PICTURES = frozenset(_PICTURE_ENDINGS.split())
#: Endings for which FFmpeg would take image2 for any path.
_STILLS = {
    "jpg": "jpeg_pipe",
    "jpeg": "jpeg_pipe",
    "bmp": "bmp_pipe",
    "tif": "tiff_pipe",
    "tiff": "tiff_pipe",
}
#: Demuxers of pictures in one file, by its first bytes.
_STILL_STARTS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"GIF8"), "gif"),
    (re.compile(rb"\xff\xd8\xff"), "jpeg_pipe"),
    (re.compile(rb"\x89PNG\r\n\x1a\n(?:(?!IDAT).)*?acTL", re.DOTALL), "apng"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png_pipe"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp_pipe"),
    (re.compile(rb"BM"), "bmp_pipe"),
    (re.compile(rb"II\*\0|MM\0\*"), "tiff_pipe"),
)


def names_other_files(head: bytes, path: str) -> str:
    """Describes a file that makes FFmpeg open other files or the network, in words that follow "it is".

    Args:
        head: its first bytes: all up to the first zero byte, or as many as FFmpeg looks at.
        path: its name, which FFmpeg may take for a pattern.

    Returns:
        the description; empty for any other file.
    """
    if is_pattern(path) and (_PATTERN.search(PurePath(path).name) or not still_demuxer(head, path)):
        return "named like a sequence of pictures in other files (image2)"
    text = leading_text(head)
    lowered = text[:64].lower()
    kinds = [kind for magic, kind in _STARTS if lowered.startswith(magic)]
    kinds += [kind for mark, kind in _MARKS if mark.search(text)]
    return f"{kinds[0]}, which names other files" if kinds else ""


def head_of(path: str) -> bytes | None:
    """Reads as many bytes of a file as ``names_other_files`` needs; None if ``read_head`` returns None."""
    head = read_head(path)
    # Text counts up to the first zero byte, however far; so does text after an ID3 tag with a cover.
    if head and (0 not in head or head.startswith(b"ID3")):
        return read_head(path, _PROBE_BYTES)
    return head


def ending_of(path: str) -> str:
    """Returns the ending of a file's name, after its last dot, in lower case."""
    return PurePath(path).name.rpartition(".")[2].lower()


def is_pattern(path: str) -> bool:
    """True if FFmpeg may take a path for a pattern of many pictures, perhaps because of a folder's name."""
    return ending_of(path) in _PICTURES and bool(_PATTERN.search(path))


def still_demuxer(head: bytes, path: str) -> str | None:
    """Returns the demuxer for a picture with a path for which FFmpeg takes image2; None for others."""
    demuxer = next((name for start, name in _STILL_STARTS if start.match(head)), None)
    return demuxer if is_pattern(path) or demuxer == _STILLS.get(ending_of(path)) else None
