"""Score a video that is played in real time through a pipe, and see whether memory, latency and counts stay as told.

    python -m benchmarks.live --seconds 180 [--video FILE] [--model vit_tiny_patch16_64] [--kill_every 60]

A process plays the file over and over, at its own rate, into a named pipe, as MPEG-TS; another, this one, scores every
frame of it in real time. With --kill_every the player is killed each so many seconds and started again after two. It
prints the summary that a live run ends with, and the memory of this process after 10 seconds and every 30 from then on.
"skipped" scores and "dropped" pictures came too late for the model, "repeated" frames had no picture of their own.
"""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import av
import torch

from benchmarks._common import parser_of, print_results, table
from datasets.augment.frames import EvalTransform
from datasets.live import LiveSource
from datasets.tools.synthetic import render_videos
from datasets.video_index import open_stream
from engine.live import watch
from engine.stream import RiskStream
from models import create_model
from utils.cli import positive, wait

_AWAY = 2.0  # seconds that a killed player is away


def play(path: str, pipe: str) -> None:
    """Play a video file into a named pipe over and over, each packet when it is due, without encoding it anew."""
    began, end = time.monotonic(), 0.0  # the end is that of what was played, in seconds
    with av.open(pipe, "w", format="mpegts", options={"flush_packets": "1"}) as output:
        stream = None
        while True:
            container, source = open_stream(path)
            stream = stream or output.add_stream_from_template(source)
            shift = None
            for packet in container.demux(source):
                if packet.dts is None:
                    continue
                shift = round(end / packet.time_base) - packet.dts if shift is None else shift
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                at = float(packet.dts * packet.time_base)
                time.sleep(max(began + at - time.monotonic(), 0))
                output.mux(packet)
            end = at + 1 / float(source.average_rate)
            container.close()


class Player:
    """A process that plays a file into a pipe; killed every so many seconds, if any, and started again."""

    def __init__(self, path: str, pipe: str, kill_every: float | None):
        self._arguments, self._kill_every = (path, pipe), kill_every
        self.kills = 0
        self._start()

    def _start(self) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=play, args=self._arguments, daemon=True)
        self._process.start()
        self._since = time.monotonic()

    def look(self) -> None:
        """Kill it, or start it again, if it is time."""
        age = time.monotonic() - self._since
        if self._kill_every is None:
            return
        if self._process.is_alive() and age > self._kill_every:
            self.kill()
            self.kills += 1
        elif not self._process.is_alive() and age > _AWAY:
            self._start()

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()
        self._since = time.monotonic()


def resident() -> float:
    """Return the memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Watch:
    """Says when the time is over; meanwhile it notes the memory each second and looks after the player."""

    def __init__(self, seconds: float, player: Player):
        self.seconds, self.player = seconds, player
        self.began, self.memory = time.monotonic(), []

    def __call__(self) -> bool:
        """Return whether the time is over."""
        passed = time.monotonic() - self.began
        if passed >= len(self.memory):
            self.memory.append(resident())
            self.player.look()
        if passed < self.seconds:
            return False
        self.player.kill()
        return True


def measure(path: str, *, seconds: float, name: str, device: str, stride: int, kill_every: float | None) -> dict:
    """Return the summary of a live run, with the memory and the kills."""
    model = create_model(name, num_classes=2).to(device)
    transform = EvalTransform(model.video.input_size)
    with tempfile.TemporaryDirectory() as folder:
        pipe = str(Path(folder) / "pipe")
        os.mkfifo(pipe)
        player = Player(path, pipe, kill_every)
        source = LiveSource(pipe, timeout=60)
        stream = RiskStream(
            model,
            lambda frame: transform([frame])[0],
            num_frames=model.video.num_frames,
            view_fps=model.video.view_fps,
            fps=source.fps,
            stride=stride,
            device=device,
        )
        run = Watch(seconds, player)
        try:
            summary = watch(source, stream, realtime=True, stop=run)
        finally:
            player.kill()
    return {"video": path, "model": name, "device": device, "stride": stride, "kills": player.kills} | summary | {
        "memory_mb": [round(value, 1) for value in run.memory[10::30]]
    }  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--video", default="", help="file to play (default: rendered roads at 30 fps)")
    parser.add_argument("--seconds", type=wait, default=180, help="how long (default: 180)")
    parser.add_argument("--model", default="vit_tiny_patch16_64", help="its name (default: vit_tiny_patch16_64)")
    parser.add_argument("--device", default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--stride", type=positive, default=1, help="frames from one score to the next (default: 1)")
    parser.add_argument("--kill_every", type=wait, help="seconds after which the player is killed (default: never)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = {"seconds": args.seconds, "name": args.model, "device": args.device, "stride": args.stride}
    with tempfile.TemporaryDirectory() as folder:
        path = args.video
        if not path:
            render_videos(Path(folder) / "videos", count=1, size=(1280, 720))
            path = str(Path(folder) / "videos" / "000000.mp4")
        results = measure(path, **options, kill_every=args.kill_every)
    print_results(
        table([{"": name, "value": text(value)} for name, value in results.items()]), results, as_json=args.json
    )


def text(value: object) -> str:
    """Return a value, or a dictionary of them, in words."""
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    main()
