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
        ("/machine/etc/passwd", "/run/replay/machine/etc/passwd"),
        ("/backend/vm/a.qcow2", "/run/replay/backend/vm/a.qcow2"),
        ("a.qcow2", "/run/replay/relative/a.qcow2"),
        ("../../etc/passwd", "/run/replay/relative/etc/passwd"),
        ("unix:/run/qga,server=on", "unix:/run/replay/run/qga,server=on"),
        ("disconnected:unix:qga,server=on", "disconnected:unix:/run/replay/relative/qga,server=on"),
    ],
)
def test_file_names(there: str, here: str) -> None:
    places = Places(FOLDER)
    for key in ("file", "filename"):
        assert places.here({key: there}) == {key: here}
        assert places.there([here]) == [there]


@pytest.mark.parametrize(
    "name",
    [
        "nbd+unix:///export?socket=/run/nbd",
        "nbd://127.0.0.1:10809/export",
        "nbd:unix:/run/nbd:exportname=x",
        "ssh://localhost/etc/passwd",
        "blkdebug::/etc/passwd",
        "blkdebug:/etc/cfg:/etc/passwd",
        "fat:rw:/etc",
        "raw:/etc/passwd",
        'json:{"driver": "nbd", "server": {"type": "inet", "host": "localhost", "port": "10809"}}',
        'json:{"driver": "qcow2", "file.driver": "ssh", "file.server.host": "localhost", "file.path": "/etc/passwd"}',
        "json:{'driver': 'file', 'filename': '/etc/passwd'}",
        "json:" + '{"a":' * 5000,
    ],
)
def test_what_is_no_plain_file_is_not_there(name: str) -> None:
    places = Places(FOLDER)
    here = places.here({"filename": name})["filename"]
    assert here.startswith(f"{FOLDER}/not-replayed/") and here.count("/") == 4
    assert places.there(here) == name and places.here({"file": name})["file"] == here


def test_a_prefix_that_says_no_more_than_that_it_is_a_file_is_left_out() -> None:
    assert Places(FOLDER).here({"file": "file:/vm/a"}) == {"file": f"{FOLDER}/vm/a"}


def test_what_is_no_file_stays() -> None:
    """By its key, as QMP has it: the same text is a file's name elsewhere."""
    path = "/machine/peripheral/disk0/virtio-backend"
    told = {"qdev": path, "device": "/dev/x", "node-name": "#block1", "driver": "qcow2", "filename": path}
    assert PLACES.here(told) == {**told, "filename": f"{FOLDER}{path}"}
    assert PLACES.here({"qdev": "/etc/passwd"}) == {"qdev": f"{FOLDER}/etc/passwd"}
    event = {"event": "DEVICE_DELETED", "data": {"path": path}}
    assert PLACES.message(event) == event
    assert PLACES.message({"event": "OTHER", "data": {"path": path}})["data"]["path"] == f"{FOLDER}{path}"


@pytest.mark.parametrize(
    ("backing", "here"),
    [
        ("a.qcow2", "a.qcow2"),
        ("../base/a.qcow2", "../base/a.qcow2"),
        ("../../a.qcow2", "/run/replay/relative/a.qcow2"),
        ("x/../../../a.qcow2", "/run/replay/relative/a.qcow2"),
        ("/vm/a.qcow2", "/run/replay/vm/a.qcow2"),
    ],
)
def test_names_in_headers_stay_relative_where_they_do_not_lead_out(backing: str, here: str) -> None:
    image = {"filename": "/vm/b.qcow2", "backing-filename": backing}
    assert PLACES.here(image)["backing-filename"] == here == PLACES.backing(backing, "/vm/b.qcow2")


def test_names_in_options_and_back() -> None:
    name = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "/vm/a"}})
    here = PLACES.here({"file": name, "size": 1, "list": ["/vm/b"], "desc": "cannot open '/vm/a': /vm/b is used"})
    assert f"{FOLDER}/vm/a" in here["file"] and here["list"] == [f"{FOLDER}/vm/b"]
    assert here["desc"] == f"cannot open '{FOLDER}/vm/a': {FOLDER}/vm/b is used"
    assert PLACES.there(here["file"]) == name and PLACES.there(here["list"]) == ["/vm/b"]


WORDS = st.lists(
    st.sampled_from(
        ["/", "..", ".", "vm", "a.qcow2", "json:", "unix:", "file:", ":", "=", ",", " ", "{", '"', "machine"]
    )
).map("".join)


@given(WORDS)
def test_all_that_we_take_for_a_path_lies_below_the_folder(name: str) -> None:
    for key in ("file", "filename", "full-backing-filename"):
        path = _plain(PLACES.here({key: name})[key])
        assert not path or os.path.normpath(path).startswith(f"{FOLDER}/") or os.path.normpath(path) == FOLDER, path
    backing = PLACES.here({"filename": "/vm/b", "backing-filename": name})["backing-filename"]
    path = _plain(backing)
    assert not path or os.path.normpath(os.path.join(f"{FOLDER}/vm", path)).startswith(FOLDER), path
