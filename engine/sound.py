"""The sound of a video file, moved into another one: packets as they are where MP4 holds them, else as AAC."""

import logging
from collections.abc import Iterator
from itertools import chain

import av

logger = logging.getLogger("tad")

_HELD = ("aac", "mp3", "ac3", "eac3", "alac", "flac", "opus")  # by MP4, and by players of it
_LOWEST_MP3 = 16000  # Hz that MP4 holds
_LOOKED_AT = 64  # packets of pictures, among which the first one that is shown is looked for
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000)


def first_picture(path: str) -> float:
    """Return the time in seconds of the first picture that a video file shows, 0 where it does not say.

    Pictures that an edit list hides are not shown, nor those before the first key frame. Raises av.FFmpegError or
    OSError where the file cannot be read.
    """
    times, begun = [], None
    with open_local(path) as container:
        stream = container.streams.best("video")
        for _, packet in zip(range(_LOOKED_AT), container.demux(stream) if stream else (), strict=False):
            if packet.size and packet.pts is not None:
                begun = packet.pts if begun is None and packet.is_keyframe else begun  # hidden or not
                times += [] if packet.is_discard else [packet.pts]
        shown = [time for time in times if begun is None or time >= begun]
        return float(min(shown) * stream.time_base) if shown else 0.0


def pixel_aspect(path: str, shape: tuple[int, int]) -> float:
    """Return the width of a pixel over its height, of upright pictures (height, width) of a video file; 1 where it does
    not say. Raises av.FFmpegError or OSError where the file cannot be read.
    """
    with open_local(path) as container:
        stream = container.streams.best("video")
        ratio = float(stream.sample_aspect_ratio or 1) if stream else 1.0
        if ratio <= 0:
            return 1.0
        lying = stream is not None and (stream.codec_context.width, stream.codec_context.height) == shape
        return 1 / ratio if lying and shape[0] != shape[1] else ratio


def open_local(path: str) -> av.container.InputContainer:
    """Open a file, and nothing that it may refer to elsewhere. Raises av.FFmpegError or OSError."""
    return av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="ignore")


class Sound:
    """The sound of a file on its way into another one, aligned with the pictures. Close it.

    path: of the file.
    output: the file that is written, before its first packet.
    start: time in the source, in seconds, that becomes 0.
    duration: seconds, after which the sound is cut.

    `stream` is that of the output, None where there is no sound. What is damaged is left out; where no more can be
    read, the sound ends, with a warning. Raises av.FFmpegError or OSError where the file cannot be opened.
    """

    def __init__(self, path: str, output: av.container.OutputContainer, start: float, duration: float):
        self._path, self._output, self._start, self._duration = path, output, start, duration
        self._container = open_local(path)
        source = self._container.streams.best("audio")
        context = source.codec_context if source is not None else None
        self.stream, self._packets, self._next = None, iter(()), None
        if context is None or not context.sample_rate:
            return
        codec = context.codec.canonical_name
        if codec in _HELD and not (codec == "mp3" and context.sample_rate < _LOWEST_MP3):
            self.stream = output.add_stream_from_template(source)
            self._packets = self._copied(source)
        else:
            rate = context.sample_rate if context.sample_rate in _AAC_RATES else 48000
            self.stream = output.add_stream("aac", rate=rate, layout="mono" if context.channels == 1 else "stereo")
            self._packets = self._encoded(source)

    def copy_until(self, time: float) -> None:
        """Write the sound up to a time of the output, in seconds. Raises av.FFmpegError where it cannot be written."""
        while (item := self._next or next(self._packets, None)) is not None:
            self._next = item
            if item[0] > time:
                return
            self._output.mux(item[1])
            self._next = None

    def close(self) -> None:
        """Release the source."""
        self._container.close()

    def _demuxed(self, source: av.AudioStream) -> Iterator[av.Packet]:
        """Yield the packets, those without a time excepted, up to where reading fails."""
        try:
            for packet in self._container.demux(source):
                if packet.size and packet.pts is not None:
                    yield packet
        except (av.FFmpegError, OSError, ValueError, IndexError) as e:
            self._warn(str(e))

    def _warn(self, reason: str) -> None:
        logger.warning(f"{self._path}: its sound ends early in the overlay ({reason})")

    def _copied(self, source: av.AudioStream) -> Iterator[tuple[float, av.Packet]]:
        """Yield (time, packet) as they are, and one packet from before the beginning, which a decoder starts with."""
        unit, last = float(source.time_base), None
        shift = round(self._start / unit)
        for packet in self._demuxed(source):
            length, packet.pts = (packet.duration or 0) * unit, packet.pts - shift
            packet.dts, time = packet.pts, packet.pts * unit
            if last is not None and time <= last:
                self._warn("its time runs backwards")
                return
            if time + length > self._duration + unit:
                return
            if time + length > -length:
                packet.stream, last = self.stream, time
                yield time, packet

    def _encoded(self, source: av.AudioStream) -> Iterator[tuple[float, av.Packet]]:
        """Yield (time, packet) of AAC, silent where the source has no sound."""
        try:
            for frame in self._resampled(source):
                for packet in self.stream.encode(frame):
                    yield float(packet.pts * packet.time_base), packet
        except (av.FFmpegError, ValueError) as e:  # the sound changes its form on the way, say
            self._warn(str(e))
        for packet in self.stream.encode(None):
            yield float(packet.pts * packet.time_base), packet

    def _resampled(self, source: av.AudioStream) -> Iterator[av.AudioFrame]:
        """Yield the sound from time 0 on in the form of the output, without holes, up to its end."""
        context, unit = self.stream.codec_context, float(source.time_base)
        shift = round(self._start / unit)
        frames, graph = self._decoded(source), av.filter.Graph()
        if (first := next(frames, None)) is None:
            return
        made = (
            # As frames come, which is not what the stream says of MP2 in a transport stream.
            graph.add_abuffer(
                sample_rate=first.sample_rate,
                format=first.format,
                layout=first.layout.name,
                time_base=source.time_base,
            ),
            graph.add("aresample", f"{context.sample_rate}:async=1:first_pts=0"),  # fills and cuts by timestamps
            graph.add("aformat", f"sample_fmts=fltp:channel_layouts={context.layout.name}"),
            graph.add("abuffersink"),
        )
        graph.link_nodes(*made).configure()
        for frame in chain([first], frames):
            frame.pts -= shift
            graph.push(frame)
            yield from self._pulled(graph)
            if frame.pts * unit > self._duration:
                return
        graph.push(None)
        yield from self._pulled(graph)

    def _decoded(self, source: av.AudioStream) -> Iterator[av.AudioFrame]:
        for packet in self._demuxed(source):
            try:
                yield from (frame for frame in source.codec_context.decode(packet) if frame.pts is not None)
            except (av.FFmpegError, ValueError):  # a damaged packet; others follow
                continue

    def _pulled(self, graph: av.filter.Graph) -> Iterator[av.AudioFrame]:
        """Yield what comes out of a graph, up to the end of the output."""
        while True:
            try:
                frame = graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            if frame.pts * float(frame.time_base) + frame.samples / frame.sample_rate <= self._duration:
                yield frame
