"""The clock of a video stream, as its packets tell it in the order of the file."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Seconds by which decoding times fall where a clock starts anew; none falls by so much within one clock.
FALL_S = 0.5
#: The same in MPEG streams, whose times are exact.
FALL_OF_MPEG_S = 0.1
#: Seconds by which times of an MPEG stream rise that are worth a word, if they rose otherwise before.
JUMP_S = 10.0
#: Ticks after which the clock of MPEG streams wraps, and how near to that a fall must be to be a wrap.
WRAP_TICKS, NEAR_WRAP_S = 2**33, 60.0


@dataclass
class Clock:
    """Keeps times running on where those of a file start anew, as they do where streams were joined.

    Decoding times never fall within a stream. Where they do, what follows is taken to follow at once: it was
    joined by ``cat``, or the clock's 33 bits were used up. FFmpeg takes a time far below the first for the
    latter and adds 33 bits to it: where times then jump ahead, they fell, too. Where they jump within the 33
    bits nobody can tell a picture that is held from a clock that was set anew: they stay, and it is said.
    Packets must come in the order of the file, from its start, so that each pass over it finds the same.

    Args:
        time_base_s: seconds of a tick.
        wraps: whether the clock has 33 bits, as in MPEG streams.

    Attributes:
        num_joins: times that the clock started anew.
        num_wraps: times that its 33 bits were used up, whether FFmpeg ran on from there or not.
        jumps: seconds at which it jumped ahead, and to which.
    """

    time_base_s: float
    wraps: bool = False
    num_joins: int = 0
    num_wraps: int = 0
    jumps: list[tuple[float, float]] = field(default_factory=list)
    _offset: int = 0
    _last: int | None = None
    _step: int = 0

    def offset(self, dts: int | None, duration: int) -> int:
        """Ticks to add to the times of the next packet.

        Args:
            dts: its decoding time; None: it states none.
            duration: of it, 0 if unknown.
        """
        if dts is None:
            return self._offset
        last = self._last
        rise_s = 0.0 if last is None else (dts - last) * self.time_base_s
        many_s = 10 * self._step * self.time_base_s
        is_reset = self.wraps and last is not None and dts % WRAP_TICKS < last % WRAP_TICKS
        is_fall = rise_s < -(FALL_OF_MPEG_S if self.wraps else FALL_S)
        if is_fall or (is_reset and rise_s > max(NEAR_WRAP_S, many_s)):
            assert last is not None
            is_wrap = self.wraps and abs(last - dts - WRAP_TICKS) * self.time_base_s < NEAR_WRAP_S
            if is_wrap:
                self._offset += WRAP_TICKS
                self.num_wraps += is_reset
            else:
                self.num_joins += 1
                self._offset += last + self._step - dts
        elif last is not None and dts > last:
            self.num_wraps += is_reset
            if self.wraps and self._step and rise_s > max(JUMP_S, many_s):
                self.jumps.append((dts * self.time_base_s - rise_s, dts * self.time_base_s))
            if not duration:
                self._step = dts - last
        self._last = dts
        self._step = duration or self._step
        return self._offset
