"""Secrets are left out, whatever form they come in; the rest stays as it is."""

import json
from typing import Any

import pytest

from qmpmerge.recording import secrets

PLANTED = "pl4nt3d-s3cr3t"

ADDED = {"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "data": PLANTED}}
HEADER = {"driver": "qcow2", "file": {"driver": "https", "url": f"https://joe:{PLANTED}@host/a", "cookie": PLANTED}}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (f"ssh://joe:{PLANTED}@host/vm/a.qcow2", "ssh://joe:(not shown)@host/vm/a.qcow2"),
        (f"iscsi://joe%{PLANTED}@host/target/0", "iscsi://joe:(not shown)@host/target/0"),
        (f"see https://host/a?X-Signature={PLANTED} there", "see https://host/a?(not shown) there"),
        (f"rbd:pool/image:id=joe:key={PLANTED}==:conf=/etc/c", "rbd:pool/image:id=joe:key=(not shown):conf=/etc/c"),
        (f"secret,id=s0,data={PLANTED},,{PLANTED},format=raw", "secret,id=s0,data=(not shown),format=raw"),
        (f"qom-type=secret,data={PLANTED},id=s0", "qom-type=secret,data=(not shown),id=s0"),
        (f"port=5900,password={PLANTED},addr=::1", "port=5900,password=(not shown),addr=::1"),
        (f"file.driver=iscsi,file.password={PLANTED}", "file.driver=iscsi,file.password=(not shown)"),
        (f'{{"qom-type":"secret","data":"{PLANTED}"}}', '{"qom-type": "secret", "data": "(not shown)"}'),
        (f"name=opt/config,string={PLANTED}", "name=opt/config,string=(not shown)"),
        (f"type=11,value=io.systemd.credential:key={PLANTED}", "type=11,value=io.systemd.credential:(not shown)"),
    ],
)
def test_in_a_text(given: str, left: str) -> None:
    assert secrets.without({"a": [given]}) == {"a": [left]}


@pytest.mark.parametrize(
    "message",
    [
        ADDED,
        {"execute": "object-add", "arguments": {"qom-type": "secret_keyring", "data": PLANTED}},
        {"execute": "set_password", "arguments": {"protocol": "vnc", "password": PLANTED}},
        {"return": {"filename": f"json:{json.dumps(HEADER)}"}},
        {"return": {"filename": f"json:{json.dumps({'backing': 'json:' + json.dumps(HEADER)})}"}},
        {"error": {"class": "GenericError", "desc": f"Could not open 'ssh://joe:{PLANTED}@host/a': no"}},
    ],
)
@pytest.mark.parametrize("form", [None, 4])
@pytest.mark.parametrize("code", ["utf-8", "utf-16-le"])
def test_in_a_message_however_it_is_written(message: Any, form: int | None, code: str) -> None:
    shown = secrets.masked(json.dumps(message, indent=form).encode(code))
    assert PLANTED.encode() not in shown and PLANTED.encode("utf-16-le") not in shown
    assert b"\n" not in shown and json.loads(shown).keys() == message.keys()


@pytest.mark.parametrize(
    "message",
    [
        {"return": {"filename": "nbd+unix:///disk?socket=/run/nbd.sock", "file": "/vm/data=1,a.qcow2"}},
        {"execute": "blockdev-add", "arguments": {"driver": "ssh", "password-secret": "s0", "key-secret": "s1"}},
        {"event": "JOB_STATUS_CHANGE", "data": {"id": "secret", "status": "running"}},
        {"return": [{"name": "password", "type": "str"}, {"name": "cookie", "default": None}]},
        {"return": {"filename": 'json:{"driver": "raw", "file": "nbd://host"}', "vnc": {"password": False}}},
    ],
)
def test_what_is_no_secret_stays(message: Any) -> None:
    assert json.loads(secrets.masked(json.dumps(message).encode())) == message


def test_what_has_no_mark_of_any_is_written_as_it_came() -> None:
    assert secrets.masked(b'{"return":  {}, "id": "7"}\r\n') == b'{"return":  {}, "id": "7"}'


def test_what_is_nested_too_deeply_is_not_shown() -> None:
    deep = b'{"return": ' + b"[" * 600 + json.dumps(PLANTED).encode() + b', "cookie"' + b"]" * 600 + b"}"
    assert PLANTED.encode() not in secrets.masked(deep)
