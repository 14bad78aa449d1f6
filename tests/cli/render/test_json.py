"""JSON for programs: one object with the shapes that DESIGN.md lists, whatever the names are."""

import dataclasses
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpmerge.chain.chain import Chain, Image, Slice
from qmpmerge.chain.outcome import MergedFile, Outcome, Verdict
from qmpmerge.cli.render.json import JsonOutput
from qmpmerge.engine.pace.progress import Progress
from qmpmerge.engine.resume import Recovery
from qmpmerge.errors import AmbiguousName, Cancelled, NoReply, NoSuchLayer, ShorterLayer, StillRunning
from qmpmerge.images.headers import Oddity
from qmpmerge.operations.clean import Cleaned
from qmpmerge.operations.snapshot import Overlay
from qmpmerge.processes.vms import Vm
from qmpmerge.qemu.blockgraph import Disk, Layout
from qmpmerge.qemu.jobs import Job
from qmpmerge.targets.target import ChainView

GIB = 1024**3
BASE = Image("/vm/base.raw", "raw", 10 * GIB, node="#block2", allocated=4 * GIB)
TOP = Image("/vm/a.qcow2", "qcow2", 10 * GIB, node="#block1", backing="base.raw", backing_format="raw", allocated=GIB)
CHAIN, RESULT = Chain((BASE, TOP)), Chain((BASE,))
JOB = Job("qmpmerge-commit-vda", "commit", "ready", GIB, 4 * GIB, ready=True, speed=1024, disk="vda")
COPYING = Progress("vda", JOB, "copied", rate=10**8, seconds_left=30.0)
SHOWN = {
    "id": "qmpmerge-commit-vda",
    "type": "commit",
    "disk": "vda",
    "status": "ready",
    "ready": True,
    "done": GIB,
    "total": 4 * GIB,
    "speed": 1024,
    "io_status": "ok",
    "reason": None,
    "ours": True,
    "verbs": ["follow", "pivot", "keep", "pause", "speed", "cancel"],
}


class Streams:
    """An output on two fake streams."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.output = JsonOutput(self.out, self.err, command="commit", quiet=quiet)

    def document(self) -> Any:
        """The one object on stdout; stderr is silent."""
        assert self.err.getvalue() == ""
        assert self.out.getvalue().count("\n") == 1 and self.out.getvalue().endswith("\n")
        return json.loads(self.out.getvalue())

    def lines(self) -> list[Any]:
        """The objects on stderr, one a line; stdout is silent."""
        assert self.out.getvalue() == ""
        return [json.loads(line) for line in self.err.getvalue().splitlines()]


@pytest.fixture
def streams() -> Streams:
    return Streams()


def disk(name: str = "vda", chain: Chain | None = CHAIN, job: Job | None = None) -> Disk:
    return Disk(name, drive=name, qdev="disk0", root="#block1", chain=chain, nodes=("#block1", "#block2"), job=job)


# --- shapes -------------------------------------------------------------------------------------------------------


def test_disks(streams: Streams) -> None:
    odd = Oddity("unfinished", "/vm/a.qcow2", "a merge was not finished")
    streams.output.disks([disk(job=JOB), dataclasses.replace(disk("cd0", None), qdev=None)], [odd])
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "done",
        "disks": [
            {
                "disk": "vda",
                "node": "#block1",
                "qdev": "disk0",
                "file": "/vm/a.qcow2",
                "format": "qcow2",
                "depth": 2,
                "virtual_size": 10 * GIB,
                "allocated": GIB,
                "read_only": False,
                "job": SHOWN,
                "details": None,
            },
            {
                "disk": "cd0",
                "node": None,
                "qdev": None,
                "file": None,
                "format": None,
                "depth": 0,
                "virtual_size": None,
                "allocated": None,
                "read_only": None,
                "job": None,
                "details": None,
            },
        ],
        "oddities": [{"name": "unfinished", "file": "/vm/a.qcow2", "message": "a merge was not finished"}],
    }


def test_chain(streams: Streams) -> None:
    odd = Oddity("no-format", "/vm/a.qcow2", "its header records no backing format")
    box = replace(BASE, file="/vm/box", slice=Slice(512))
    chain = Chain((box, replace(TOP, data=Image("/vm/a.data", "raw", 0))))
    streams.output.chain(ChainView(disk(), chain, (odd,), Layout((), (), {}, {})))
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "done",
        "disk": "vda",
        "images": [
            {
                "index": 1,
                "node": "#block2",
                "file": "/vm/box",
                "slice": {"offset": 512, "size": None},
                "data_file": None,
                "format": "raw",
                "virtual_size": 10 * GIB,
                "allocated": 4 * GIB,
                "backing": None,
                "backing_format": None,
                "active": False,
                "details": None,
            },
            {
                "index": 2,
                "node": "#block1",
                "file": "/vm/a.qcow2",
                "slice": None,
                "data_file": "/vm/a.data",
                "format": "qcow2",
                "virtual_size": 10 * GIB,
                "allocated": GIB,
                "backing": "base.raw",
                "backing_format": "raw",
                "active": True,
                "details": None,
            },
        ],
        "oddities": [{"name": "no-format", "file": "/vm/a.qcow2", "message": "its header records no backing format"}],
        "job": None,
    }


def test_snapshot(streams: Streams) -> None:
    made = [
        Overlay("vda", "/vm/c.qcow2", "n1", "/vm/b.qcow2", backing="b.qcow2"),
        Overlay("vdb", "/vm/d.qcow2", "n2", "/b.raw", "a hint", backing="d.raw"),
    ]
    streams.output.snapshot(made)
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "created",
        "overlays": [
            {
                "disk": "vda",
                "node": "n1",
                "file": "/vm/c.qcow2",
                "backing": "b.qcow2",
                "backing_file": "/vm/b.qcow2",
            },
            {"disk": "vdb", "node": "n2", "file": "/vm/d.qcow2", "backing": "d.raw", "backing_file": "/b.raw"},
        ],
        "hints": ["a hint"],
    }


def test_commit(streams: Streams) -> None:
    merged = (MergedFile("/vm/a.qcow2", action="stash", now="/vm/a.qcow2.merged"),)
    streams.output.commit(
        Outcome(
            "pivoted",
            "vda",
            CHAIN,
            RESULT,
            None,
            merged,
            GIB,
            1.23456,
            ("a hint",),
            paused_seconds=0.0074,
            converge=("paused",),
        )
    )
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "pivoted",
        "disk": "vda",
        "job": None,
        "before": ["/vm/base.raw", "/vm/a.qcow2"],
        "after": ["/vm/base.raw"],
        "merged": [{"file": "/vm/a.qcow2", "action": "stash", "now": "/vm/a.qcow2.merged", "obstacle": None}],
        "copied": GIB,
        "seconds": 1.235,
        "verified": False,
        "paused_seconds": 0.0074,
        "hints": ["a hint"],
        "checks": [],
        "estimate": None,
        "other_way": None,
        "converge": ["paused"],
    }


@pytest.mark.parametrize("verdict", ["merged", "pivoted", "kept", "ready", "planned", "unchanged", "pulled"])
def test_a_commit_has_the_same_keys_whatever_its_verdict(streams: Streams, verdict: Verdict) -> None:
    streams.output.commit(Outcome(verdict, "vda", CHAIN, CHAIN))
    document = streams.document()
    assert document.pop("verdict") == verdict
    shape = {"schema", "command", "disk", "job", "before", "after", "merged", "copied", "seconds", "verified", "hints"}
    shape |= {"checks", "estimate", "other_way", "paused_seconds", "converge"}
    assert set(document) == shape
    assert (document["job"], document["copied"], document["merged"], document["hints"]) == (None, None, [], [])


def test_jobs(streams: Streams) -> None:
    streams.output.jobs([JOB, Job("other", "backup", "concluded", 1, 1, reason="No space left on device")])
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "done",
        "jobs": [
            SHOWN,
            {
                "id": "other",
                "type": "backup",
                "disk": None,
                "status": "concluded",
                "ready": False,
                "done": 1,
                "total": 1,
                "speed": 0,
                "io_status": "ok",
                "reason": "No space left on device",
                "ours": False,
                "verbs": ["dismiss"],
            },
        ],
    }


def test_a_controlled_job_has_the_shape_of_a_listed_one() -> None:
    listed, controlled, gone = Streams(), Streams(), Streams()
    listed.output.jobs([JOB])
    controlled.output.controlled(JOB.id, "pause", JOB)
    gone.output.controlled(JOB.id, "cancel", None)
    (entry,) = listed.document()["jobs"]
    assert controlled.document() == {"schema": 1, "command": "commit", "verdict": "done", "job": entry}
    assert gone.document() == {"schema": 1, "command": "commit", "verdict": "done", "job": None}


def test_vms(streams: Streams) -> None:
    streams.output.vms([Vm(42, "web", ("/run/web.sock",), False, "me", "qemu-system-x86_64", 1.5)])
    (vm,) = streams.document()["vms"]
    assert vm.items() >= {
        ("name", "web"),
        ("pid", 42),
        ("user", "me"),
        ("libvirt", False),
    }
    assert vm["monitors"] == ["/run/web.sock"]


@pytest.mark.parametrize("kind", ["disks", "jobs", "vms"])
def test_an_empty_list_is_still_an_object(streams: Streams, kind: str) -> None:
    getattr(streams.output, kind)([])
    also: dict[str, list[object]] = {"oddities": []} if kind == "disks" else {}
    assert streams.document() == {"schema": 1, "command": "commit", "verdict": "done", kind: [], **also}


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_has_its_name_sentence_hint_and_facts(streams: Streams) -> None:
    error = ShorterLayer(image="/vm/a.qcow2", size=GIB, base="/vm/base.raw", base_size=2 * GIB)
    streams.output.failure(error)
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "refused",
        "error": {
            "name": "shorter-layer",
            "message": str(error),
            "hint": error.hint,
            "facts": {
                "image": "/vm/a.qcow2",
                "size": GIB,
                "base": "/vm/base.raw",
                "base_size": 2 * GIB,
                "instead": "merge into an image above the short one",
            },
        },
    }


@pytest.mark.parametrize(
    ("error", "verdict", "facts"),
    [
        (AmbiguousName(target="web", pids=[1, 2]), "unreachable", {"target": "web", "pids": [1, 2]}),
        (
            NoSuchLayer(layer="9", disk="vda", count=1, known=["1 /vm/base.raw"]),
            "refused",
            {"layer": "9", "disk": "vda", "count": 1, "known": ["1 /vm/base.raw"], "nearest": None},
        ),
        (
            NoReply(target="/run/q", command="query-jobs", seconds=0.5),
            "unknown",
            {"target": "/run/q", "command": "query-jobs", "seconds": 0.5},
        ),
        (Cancelled(), "cancelled", {}),
    ],
)
def test_facts_keep_their_types(streams: Streams, error: Any, verdict: str, facts: dict[str, object]) -> None:
    streams.output.failure(error)
    document = streams.document()
    assert set(document) == {"schema", "command", "verdict", "error"}
    assert set(document["error"]) == {"name", "message", "hint", "facts"}
    assert document["verdict"] == verdict and document["error"]["facts"] == facts


def test_a_job_that_goes_on_is_told_as_an_outcome_with_the_error() -> None:
    known, unknown = Streams(), Streams()
    error = StillRunning(target="vm1", job=JOB.id)
    unknown.output.failure(error)
    error.outcome = Outcome("running", "vda", CHAIN, CHAIN, JOB, copied=GIB)
    known.output.failure(error)
    document, nothing = known.document(), unknown.document()
    assert (document["verdict"], document["job"], document["copied"]) == ("running", SHOWN, GIB)
    assert (document["before"], document["after"]) == (CHAIN.files, None)
    assert list(document) == list(nothing) and document["error"] == nothing["error"]


# --- what is said meanwhile ---------------------------------------------------------------------------------------


def test_progress_is_one_object_a_line_on_stderr(streams: Streams) -> None:
    streams.output.progress(dataclasses.replace(COPYING, rate=None, seconds_left=None))
    streams.output.progress(COPYING)
    first, second = streams.lines()
    assert second == {
        "event": "progress",
        "target": None,
        "disk": "vda",
        "job": SHOWN,
        "counts": "copied",
        "rate": 1e8,
        "seconds_left": 30.0,
        "dirty_rate": None,
        "converging": None,
        "shortage": None,
    }
    assert first == {**second, "rate": None, "seconds_left": None}


def test_what_is_said_once_of_a_job_is_a_line_of_its_own(streams: Streams) -> None:
    streams.output.progress(dataclasses.replace(COPYING, note="going on", hint="the guest writes too fast"))
    assert streams.lines()[1:] == [
        {"event": "note", "message": "going on"},
        {"event": "hint", "message": "the guest writes too fast"},
    ]


def test_notes_and_the_conversation_are_objects_on_stderr_too(streams: Streams) -> None:
    streams.output.note("cancelling")
    streams.output.trace({"t": 0.5, "kind": "end"})
    assert streams.lines() == [
        {"event": "note", "message": "cancelling"},
        {"event": "trace", "line": {"t": 0.5, "kind": "end"}},
    ]


def test_quiet_leaves_out_progress_and_notes_but_not_the_conversation() -> None:
    streams = Streams(quiet=True)
    streams.output.progress(COPYING)
    streams.output.note("cancelling")
    streams.output.trace({"t": 0.5, "kind": "end"})
    streams.output.close()
    assert [line["event"] for line in streams.lines()] == ["trace"]


def test_quiet_does_not_touch_the_result() -> None:
    loud, quiet = Streams(), Streams(quiet=True)
    for streams in (loud, quiet):
        streams.output.commit(Outcome("merged", "vda", CHAIN, RESULT, hints=("a hint",)))
    assert loud.document() == quiet.document()


# --- names from outside -------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=()), min_size=1, max_size=12)


@given(names)
def test_any_name_makes_one_line_of_ascii_json_and_comes_back_as_it_was(name: str) -> None:
    path = f"/vm/{name}"
    image = Image(path, "qcow2", GIB, node=name, backing=name)
    chain = Chain((image,))
    streams = Streams()
    streams.output.chain(ChainView(disk(name, chain), chain, (Oddity("unreadable", path, name),), EMPTY))
    assert streams.out.getvalue().isascii()
    document = streams.document()
    assert document["disk"] == document["images"][0]["node"] == document["images"][0]["backing"] == name
    assert document["images"][0]["file"] == document["oddities"][0]["file"] == path


EMPTY = Layout((), (), {}, {})


@given(names)
def test_any_name_in_a_failure_or_in_progress_comes_back_as_it_was(name: str) -> None:
    failed, told = Streams(), Streams()
    failed.output.failure(NoSuchLayer(layer=name, disk=name, count=1, known=[name]))
    told.output.progress(dataclasses.replace(COPYING, disk=name))
    told.output.note(name)
    told.output.trace({"t": 0.5, "kind": "received", "session": 1, "message": name})
    assert failed.document()["error"]["facts"] == {
        "layer": name,
        "disk": name,
        "count": 1,
        "known": [name],
        "nearest": None,
    }
    assert [line.get("disk", line.get("line", line).get("message")) for line in told.lines()] == [name] * 3
    assert told.err.getvalue().isascii()


def test_recoveries_and_what_was_cleaned() -> None:
    merged = (MergedFile("/vm/a.qcow2", "stash", "/vm/a.qcow2.merged"),)
    found = [
        Recovery("unchanged", "/vm/x", None, "nothing"),
        Recovery("done", "/vm/a", "/vm/b", "done", ("why",), merged),
    ]
    streams = Streams()
    streams.output.recovered(found)
    document = streams.document()
    assert document["verdict"] == "done"
    assert document["merges"][1] == {
        "verdict": "done",
        "file": "/vm/a",
        "start_from": "/vm/b",
        "message": "done",
        "reasons": ["why"],
        "hints": [],
        "merged": [{"file": "/vm/a.qcow2", "action": "stash", "now": "/vm/a.qcow2.merged", "obstacle": None}],
    }
    streams = Streams()
    streams.output.cleaned([Cleaned("/vm/a.merged", 1, "in use")], dry_run=False)
    assert streams.document() == {
        "schema": 1,
        "command": "commit",
        "verdict": "unchanged",
        "stashed": [{"file": "/vm/a.merged", "allocated": 1, "action": "keep", "obstacle": "in use"}],
    }
