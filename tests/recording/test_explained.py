"""Recordings of several VMs, explained."""

import json
from pathlib import Path

from rig.command import JOB, invoke
from rig.fleet import Fleet

STATES = ["planned", "copying", "safe", "switching", "switched", "proved", "done"]


def test_each_step_of_several_vms_tells_whose_it_is(tmp_path: Path) -> None:
    """Their jobs have the same name."""
    fleet, recording = Fleet(tmp_path), tmp_path / "rec"
    with fleet.vm("one", ["vda"]) as one, fleet.vm("two", ["vda"]) as two:
        done = invoke("tidy", one.target, two.target, "--keep", "1", "--record", str(recording), "-v")
        assert done.code == 0, done.err
    targets = [one.target, two.target]
    steps = [line for line in map(json.loads, recording.read_text().splitlines()) if line["kind"] == "step"]
    (run,) = invoke("explain", str(recording), "--json").document["runs"]
    texts = [item["text"] for item in run["items"] if item["kind"] == "step"]
    for target in targets:
        names = [line["name"] for line in steps if line["target"] == target]
        assert names[0] == "checked" and {"record", "started", "compared", "proved", "merged-file"} < set(names)
        assert f"-- {target}: {JOB}: safe to switching\n" in done.err
        assert f"{target}: {JOB}: safe to switching" in texts
        states = [spent["state"].rsplit(": ", 1) for spent in run["spent"]]
        assert [state for owner, state in states if owner == f"{target}: {JOB}"] == STATES
        seconds = [spent["seconds"] for spent in run["spent"] if spent["state"].startswith(f"{target}: ")]
        assert abs(sum(seconds) - run["seconds"]) < 0.001
    assert {line["target"] for line in steps} == set(targets)
    assert len(texts) == len(steps) and len(run["spent"]) == 2 * len(STATES)
