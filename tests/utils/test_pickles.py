"""What a refused pickle wanted to call is named, in every protocol; nothing of it is called."""

import os
import pickle
import zipfile

import pytest
import torch

from engine.checkpoint import load_last
from models.weights import CheckpointError, read_checkpoint
from utils.cli import ConfigError
from utils.pickles import refused_code


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def raw(protocol):
    return lambda content, path: path.write_bytes(pickle.dumps(content, protocol=protocol))


WRITERS = {
    "zip": torch.save,
    "zip of protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "before 1.6": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    **{f"pickle of protocol {number}": raw(number) for number in (0, 2, 4, 5)},
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "posix.system"), (eval, "eval"), (os.path.join, "posixpath.join")]
)
def test_code_is_named_and_not_called(tmp_path, writer, function, name):
    path = tmp_path / "state.pth"
    argument = f"open({str(tmp_path / 'called')!r}, 'w')" if function is eval else f"touch {tmp_path / 'called'}"
    WRITERS[writer]({"model": {"a": [1.0]}, "x": Calls(function, argument)}, path)
    with pytest.raises(CheckpointError, match=rf"{path}: it pickles \S*{name}, which is refused because .* run code"):
        read_checkpoint(str(path))
    if zipfile.is_zipfile(path):  # as every state is
        with pytest.raises(ConfigError, match=rf"{path}: it pickles \S*{name}, which is refused because"):
            load_last(tmp_path)
    assert not (tmp_path / "called").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_without_code_that_is_not_read_is_called_whole(tmp_path):
    path = tmp_path / "weights.pth"
    raw(4)({"a": [1.0, 2.0]}, path)
    with pytest.raises(CheckpointError, match=f"{path}: a whole pickle, but in a protocol that is not read: re-save"):
        read_checkpoint(str(path))


def test_a_name_that_is_not_utf8_is_no_damage(tmp_path):
    """PyTorch writes into such a folder and does not read in it."""
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    torch.save({"model": {}}, folder / "state.pth")
    for read, error in ((lambda: read_checkpoint(str(folder / "state.pth")), CheckpointError),
                        (lambda: load_last(folder), ConfigError)):  # fmt: skip
        with pytest.raises(error, match="udcff/state.pth: its name is not in UTF-8, and PyTorch opens no other"):
            read()


def test_what_is_no_pickle_pickles_no_code(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"text", b"\x80\x04", pickle.dumps({"x": Calls(os.system, "")})[:9]):
        path.write_bytes(content)
        assert refused_code(path, ValueError("what torch says")) is None
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cposix\n")
    assert refused_code(path, ValueError("what torch says")) is None
