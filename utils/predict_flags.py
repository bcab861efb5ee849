"""The flags of run_predict.py, in groups. `fixed` ones are in the scores: a folder is continued with the same."""

from utils.cli import Number, Parser, folder, frame_rate, from_to, positive, share, wait
from utils.event_rule import seconds
from utils.flags import FlagGroup

OUTPUTS = ("scores", "curve", "overlay", "report")


def predict_parser(description: str) -> Parser:
    """Return the command line of run_predict.py."""
    parser = Parser(description, most=("weights", "output_dir", "threshold", "write", "num_workers", "stream"))
    help = "video files, folders that are searched for them, lists of them, zips or folders of pictures"
    parser.add_argument("inputs", nargs="*", metavar="VIDEO_OR_FOLDER", help=help)
    group = FlagGroup(parser, "what to score with")
    help = "weights file, which says what its model is fed: of run_finetune.py, or exported by python -m models.export"
    group.free("weights", None, help, required=True, metavar="FILE")
    group.fixed("stride", 1, "step between scores, in frames of the video", type=positive)
    help = "before a window is full: no scores (none), or those of a window that repeats the first frame, marked"
    group.fixed("warm_up", "none", help, choices=["none", "repeat"])
    help = "frame rate of zips and folders of pictures"
    group.fixed("assume_fps", 30.0, help, type=frame_rate)
    _add_event_flags(parser)
    _add_live_flags(parser)
    _add_output_flags(parser)
    _add_runtime_flags(parser)
    return parser


def _add_event_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "events; what is left out is the operating point in the weights file, see --eval")
    group.free("threshold", None, "score from which a frame is risky", type=share)
    help = "seconds for which scores must be risky before an event counts"
    group.free("alert_after", None, help, type=seconds)
    group.free("event_gap", None, "seconds below the threshold that do not end an event", type=seconds)
    group.free("event_min_duration", None, "seconds from which an event counts", type=seconds)
    help = "time constant in seconds by which scores are smoothed for events, while they rise (default: no)"
    group.free("smooth_rise", None, help, type=seconds)
    group.free("smooth_fall", None, "the same while they fall", type=seconds)


def _add_live_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "live; alerts are lines of JSON on stdout, the log is on stderr")
    help = "score this as it comes: a camera (/dev/video0), a URL (rtsp, http), a named pipe, - for stdin, or a file"
    group.free("stream", None, help, metavar="SOURCE")
    group.free("stream_fps", None, "frame rate of the source (default: what it states)", type=frame_rate)
    group.free("paced", False, "read a file at its own pace, as a camera would come")
    help = "leave scores out rather than fall behind, where a pipe or file comes at a camera's pace"
    group.free("realtime", False, help)
    help = "seconds after which, in real time, a picture is not scored if a newer one waits"
    group.free("max_delay", 0.2, help, type=Number(0, 60))
    group.free("on_event", None, "command that gets the JSON of each event on stdin", metavar="COMMAND")
    group.free("webhook", None, "address to post the JSON of an event to", metavar="URL")
    group.free("report_every", 10.0, "seconds between lines of the log", type=wait)
    help = "seconds in which a source must open, and in which something must come from a camera or URL"
    group.free("stream_timeout", 10.0, help, type=wait)
    help = "seconds before a source that broke is opened again, doubled after each failure up to 30; 0: never"
    group.free("reconnect", 1.0, help, type=Number(0, 3600))
    group.free("outage", 600.0, "seconds without a picture after which a source is given up", type=wait)


def _add_output_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "output")
    help = "folder for what is written, a folder in it for each video"
    group.free("output_dir", None, help, required=True, type=folder, metavar="DIR")
    help = (
        "what to write, with commas: scores (scores.csv and events.json, always written), curve (curve.png), overlay "
        "(overlay.mp4), report (summary.csv and report.html over all videos)"
    )
    group.free("write", ",".join(OUTPUTS), help, metavar="NAMES")
    group.free("explain", False, "draw where the model looked at the peak of each event")
    help = "file that keeps the frame counts of videos (default: videos.json in --output_dir)"
    group.free("scan_cache", None, help, metavar="FILE")


def _add_runtime_flags(parser: Parser) -> None:
    group = FlagGroup(parser, "runtime")
    help = "where to run (default: cuda if PyTorch finds it, else cpu)"
    group.free("device", None, help, choices=["cuda", "cpu"])
    help = "number format (default: bf16 on CUDA, fp32 on the CPU)"
    group.fixed("precision", None, help, choices=["bf16", "fp16", "fp32"])
    group.free("eval_batch_size", 64, "windows per process and forward pass", type=from_to(1, 65536))
    group.free("num_workers", 4, "reading processes per process", type=from_to(0, 1024))
    help = "seconds without a picture read after which a video counts as unreadable; none with --num_workers 0"
    group.free("read_timeout", 60.0, help, type=wait)
    group.free("pin_mem", True, "pin host memory for faster copies to the GPU")
    help = "minutes a process waits for the others at the start before the run ends"
    group.free("dist_timeout", 30.0, help, type=wait)
