"""No name that comes from a recording leads to a file of this machine."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.recording.places import Places
from qmpmerge.targets.target import _plain

FOLDER = "/run/replay"
PLACES = Places(FOLDER)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ("/vm/a.qcow2", "/run/replay/vm/a.qcow2"),
        ("//vm/../../etc/passwd", "/run/replay/etc/passwd"),
        ("/machine/peripheral/disk0/virtio-backend", "/machine/peripheral/disk0/virtio-backend"),
        ("/machine/../etc/passwd", "/run/replay/etc/passwd"),
        ("unix:/run/qga,server=on", "unix:/run/replay/run/qga,server=on"),
        ("disconnected:unix:qga,server=on", "disconnected:unix:/run/replay/qga,server=on"),
        ("nbd+unix:///export?socket=/run/nbd", "nbd+unix:///export?socket=/run/replay/run/nbd"),
        ("nbd://host:10809/export", "nbd://host:10809/export"),
        ("nbd:unix:/run/nbd:exportname=x", "nbd:unix:/run/replay/run/nbd:exportname=x"),
        ("file:/vm/a", "file:/run/replay/vm/a"),
        ("a.qcow2", "a.qcow2"),
    ],
)
def test_names(there: str, here: str) -> None:
    assert PLACES.here(there) == here


def test_names_in_options_and_back() -> None:
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "/vm/a"}})
    here = PLACES.here({"file": name, "size": 1, "list": ["/vm/b"]})
    assert f"{FOLDER}/vm/a" in here["file"] and here["list"] == [f"{FOLDER}/vm/b"]
    assert PLACES.there(here) == {"file": name, "size": 1, "list": ["/vm/b"]}


WORDS = st.lists(
    st.sampled_from(
        ["/", "..", ".", "vm", "a.qcow2", "json:", "unix:", "file:", ":", "=", ",", " ", "{", '"', "machine"]
    )
).map("".join)


@given(WORDS)
def test_what_we_take_for_a_path_lies_below_the_folder(name: str) -> None:
    path = _plain(PLACES.here(name))
    if path is not None and path.startswith("/") and not path.startswith("/machine"):
        assert os.path.normpath(path).startswith(FOLDER), path
