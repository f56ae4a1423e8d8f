"""The clock of a video stream, followed through its packets in the order of the file."""

from __future__ import annotations

from dataclasses import dataclass, field

#: Seconds by which decoding times fall if a clock starts anew; within one clock no time falls as much.
FALL_S = 0.5
#: The same in MPEG streams, which have exact times.
FALL_OF_MPEG_S = 0.1
#: Seconds of a rise in an MPEG stream's times that is reported, if it is unlike earlier rises.
JUMP_S = 10.0
#: Ticks after which clocks start at 0 again, by container: 26 hours of MPEG streams, 49 days of FLV.
WRAP_TICKS, FLV_WRAP_TICKS = 2**33, 2**32
WRAPS = {
    "mpegts": WRAP_TICKS,
    "mpeg": WRAP_TICKS,
    "flv": FLV_WRAP_TICKS,
    "live_flv": FLV_WRAP_TICKS,
    "kux": FLV_WRAP_TICKS,
}
#: Seconds by which a fall may differ from that and still be a wrap.
NEAR_WRAP_S = 60.0


@dataclass
class Clock:
    """A clock that runs on where the times of a file start anew, as in joined streams.

    Decoding times never fall within a stream. If they do, the next packet is taken to follow at once: streams
    were joined by ``cat``, or the clock's bits wrapped around. FFmpeg takes a time far below the first for a
    wrap and adds those bits to it: if times then jump ahead, they fell, too. If the times of an MPEG stream
    jump otherwise, a picture that is held cannot be told from a clock that was set anew: the times are kept,
    and the jump is reported. Packets must come in the order of the file, from its start: each pass over it
    then finds the same.

    Args:
        time_base_s: seconds of a tick.
        wraps: ticks after which the clock starts at 0 again, see ``WRAPS``; 0 for never.

    Attributes:
        num_joins: number of times that the clock started anew.
        num_wraps: number of wraps, whether FFmpeg continued the times or not.
        jumps: (from, to) in seconds of each jump ahead.
    """

    time_base_s: float
    wraps: int = 0
    num_joins: int = 0
    num_wraps: int = 0
    jumps: list[tuple[float, float]] = field(default_factory=list)
    _offset: int = 0
    _last: int | None = None
    _step: int = 0

    @property
    def is_mpeg(self) -> bool:
        """True if it is the clock of an MPEG stream."""
        return self.wraps == WRAP_TICKS

    def offset(self, dts: int | None, duration: int) -> int:
        """Returns the ticks to add to the times of the next packet.

        Args:
            dts: decoding time of the packet; None if it has none.
            duration: duration of the packet; 0 if unknown.
        """
        if dts is None:
            return self._offset
        last = self._last
        rise_s = 0.0 if last is None else (dts - last) * self.time_base_s
        many_s = 10 * self._step * self.time_base_s
        is_reset = self.wraps > 0 and last is not None and dts % self.wraps < last % self.wraps
        is_fall = rise_s < -(FALL_OF_MPEG_S if self.is_mpeg else FALL_S)
        if is_fall or (is_reset and rise_s > max(NEAR_WRAP_S, many_s)):
            assert last is not None
            if self.wraps and abs(last - dts - self.wraps) * self.time_base_s < NEAR_WRAP_S:
                self._offset += self.wraps
                self.num_wraps += is_reset
            else:
                self.num_joins += 1
                self._offset += last + self._step - dts
        elif last is not None and dts > last:
            self.num_wraps += is_reset
            if self.is_mpeg and self._step and rise_s > max(JUMP_S, many_s):
                self.jumps.append((dts * self.time_base_s - rise_s, dts * self.time_base_s))
            if not duration:
                self._step = dts - last
        self._last = dts
        self._step = duration or self._step
        return self._offset
