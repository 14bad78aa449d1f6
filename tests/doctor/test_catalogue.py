"""What the doctor can find is told in one place, and nothing else is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import qmpmerge
from qmpmerge.doctor import images, jobs, target
from qmpmerge.doctor.catalogue import MEANINGS
from qmpmerge.doctor.findings import SEVERITIES
from qmpmerge.errors import ActiveUnknown, NoActive, SeveralActive

WING = Path(qmpmerge.__path__[0]) / "doctor"


def written() -> Iterator[str]:
    """The names that stand in the code as words."""
    for file in WING.glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Finding":
                yield from (str(one.value) for one in call.args[:1] if isinstance(one, ast.Constant))


def test_every_finding_is_told_and_nothing_else_is() -> None:
    ended = {"failed": "concluded", "frozen": "pending"}
    names = {
        *written(),
        *images.WHY,
        *target.WHY_ODD,
        *(f"guest-{state}" for state in target.STANDING),
        *(f"job-{ended.get(state, state)}" for state in jobs.MEANINGS),
        *(kind.__new__(kind).name for kind in (NoActive, SeveralActive, ActiveUnknown)),
    }
    assert names == set(MEANINGS)


def test_each_is_as_bad_as_the_doctor_says_and_the_worst_come_first() -> None:
    worst = [SEVERITIES.index(severities[0]) for severities, _meaning, _fix in MEANINGS.values()]
    assert all(
        list(bad) == sorted(bad, key=SEVERITIES.index) for bad, _meaning, _fix in MEANINGS.values() if bad[0] != "note"
    )
    assert worst[0] == 0 and worst[-1] == 2
    odd = {"guest-io-error": "harm", "guest-paused": "care"}
    assert {name: MEANINGS[name][0][0] for name in odd} == odd
    for name, (severity, _why) in images.WHY.items():
        assert severity in MEANINGS[name][0]
