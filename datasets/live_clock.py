"""One ascending clock for a live source, whatever becomes of its own."""

_JUMP = 10.0  # seconds by which a live source's clock may run ahead of ours before it counts as set anew
_LATE = 1.0  # seconds that a picture may come out of order where packets were lost, not since the clock was set


class Clock:
    """Turns the timestamps of connections into ascending seconds since the first picture.

    fps: pictures per second where they have no timestamps; None: unknown.
    live: whether pictures come when they are taken, so that our clock tells how far apart they are.
    """

    def __init__(self, fps: float | None, *, live: bool):
        self._period, self._live = 1 / fps if fps else 0.0, live
        self.began = 0.0  # when the first picture arrived
        self._last: tuple[float | None, float, float] | None = None  # stamp, arrival and time of the last picture
        self._lead = 0.0  # seconds by which our time is ahead of arrivals
        self._offset, self._broke = 0.0, False

    def broke(self) -> None:
        """Note that the timestamps to come are of another connection."""
        self._broke = True

    def time(self, stamp: float | None, arrived: float) -> float | None:
        """Return the seconds of a picture, from its timestamp in seconds and its arrival on time.monotonic().

        None for one that is out of order: up to a second before the one that came last.
        """
        if self._last is None:
            self.began, at = arrived, 0.0
            self._offset, self._lead = -(stamp or 0.0), -arrived
        else:
            last_stamp, last_arrived, last = self._last
            passed = arrived - last_arrived
            none = stamp is None or last_stamp is None
            step = 0.0 if none else stamp - last_stamp
            if -_LATE <= step < 0 and not self._broke:
                return None
            set_anew = none or step < 0 or (self._live and step > passed + _JUMP)
            if self._broke or set_anew:
                at = last + self._period
                if self._live or self._broke:
                    at = max(at, arrived + self._lead)
                self._offset = at - (stamp or 0.0)
            else:
                at = stamp + self._offset
            if stamp is not None or not self._live:  # else those that come late would add up
                self._lead = at - arrived
        self._last, self._broke = (stamp, arrived, at), False
        return at
