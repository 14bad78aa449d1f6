"""Secrets are left out, whatever form they come in; the rest stays as it is."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qmpmerge.recording import secrets
from qmpmerge.recording.secrets import MASK

PLANTED = "pl4nt3d-s3cr3t"

ADDED = {"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s0", "data": PLANTED}}
HEADER = {"driver": "qcow2", "file": {"driver": "https", "url": f"https://joe:{PLANTED}@host/a", "cookie": PLANTED}}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (f"ssh://joe:{PLANTED}@host/vm/a.qcow2", "ssh://(not shown)@host/vm/a.qcow2"),
        (f"iscsi://joe%{PLANTED}@host/target/0", "iscsi://(not shown)@host/target/0"),
        (f"see https://host/a?X-Signature={PLANTED} there", "see https://host/a?(not shown) there"),
        (f"rbd:pool/image:id=joe:key={PLANTED}==:conf=/etc/c", "rbd:pool/image:id=joe:key=(not shown):conf=/etc/c"),
        (f"secret,id=s0,data={PLANTED},,{PLANTED},format=raw", "secret,id=s0,data=(not shown),format=raw"),
        (f"qom-type=secret,data={PLANTED},id=s0", "qom-type=secret,data=(not shown),id=s0"),
        (f"port=5900,password={PLANTED},addr=::1", "port=5900,password=(not shown),addr=::1"),
        (f"file.driver=iscsi,file.password={PLANTED}", "file.driver=iscsi,file.password=(not shown)"),
        (f'{{"qom-type":"secret","data":"{PLANTED}"}}', '{"qom-type": "secret", "data": "(not shown)"}'),
        (f"name=opt/config,string={PLANTED}", "name=opt/config,string=(not shown)"),
        (f"x json: {{'cookie':'{PLANTED}'}}, which", "x json: (not shown)"),
        (f'a names json:{{"cookie": "{PLANTED}"}}, which', 'a names json:{"cookie": "(not shown)"}, which'),
        (f"https://joe:a@{PLANTED}@host/x?sig={PLANTED}", "https://(not shown)@host/x?(not shown)"),
        (f"object.sec0.data={PLANTED}", "object.sec0.data=(not shown)"),
        (f"type=11,value=io.systemd.credential:key={PLANTED}", "type=11,value=io.systemd.credential:(not shown)"),
    ],
)
def test_in_a_text(given: str, left: str) -> None:
    assert secrets.without({"a": [given]}) == {"a": [left]}


def test_a_long_text_of_a_word_that_marks_a_secret_takes_no_longer_for_it() -> None:
    """By the square of its length it would be an hour, in which nothing else of ours runs."""
    text = "credential" * 100_000 + "object.a" * 100_000
    assert secrets.without(text) == text


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


HALVES = "PL4NT", "S3CRT"
SECRETS = [
    between.join(HALVES)
    for between in ("/", "'", '"', "#", "@", "%", "=", "&", ";", "{", '{"a', "}", "\\", "é", ",", " ")
]
OPTIONS = [
    *("port=1,password={}", "file.driver=iscsi,file.password={},lun=0", "secret,id=s,data={}", "file.cookie=a={},id=x"),
    *("qom-type=secret_keyring,id=s,data={},format=raw", "root=/dev/vda password={}", "OS_PASSWORD={}", "user=u,pw={}"),
    *("name=opt/x,string={}", "type=11,value=io.systemd.credential.binary:a={}", "systemd.set_credential=a:{}"),
    *("driver=https,url=https://joe:{}@h/x,id=d", "Cookie: {}", "set_password vnc {}", "change vnc password {}"),
]
OBJECTS: list[Any] = [
    *({"qom-type": "secret", "id": "s", "data": ...}, {"qom-type": "secret", "props": {"data": ...}}),
    *({"password": ...}, {"file.cookie": ...}, {"PASSWD": [...]}, {"server": {"proxy-password": {"a": ...}}}),
    *(
        {"execute": "qom-set", "arguments": {"property": "data", "value": ...}},
        {"driver": "rbd", "=keyvalue-pairs": ...},
        {"a": [{"token": ...}]},
    ),
]


def named(secret: str) -> Iterator[str]:
    """Names and options with it in them, as people, QEMU and we write them."""
    escaped = secret.replace(",", ",,")
    yield from (option.format(escaped) for option in OPTIONS)
    yield from (f"{scheme}://joe:{secret}@host/x" for scheme in ("https", "ssh", "nbd", "FTP", "nfs"))
    yield from (f"iscsi://joe%{secret}@host/x/0", f"https://{secret}@host/x", f"https://u:p@h/x?sig={secret}")
    yield f"rbd:pool/image:id=a:key={secret}:conf=/x"
    for value in OBJECTS:
        text = json.dumps(value, default=lambda _: secret).replace("Ellipsis", "")
        single = text.replace('"', "'")
        yield from (text, f"json:{text}", f"json: {text}", single, f"json:{single}", f"json:\n{single}")
        yield from (json.dumps({"backing": f"json:{text}"}), "json:" + json.dumps({"file": {"x": f"json: {text}"}}))


SENTENCES = ["{}", "Could not open '{}': No such file", "x.qcow2 names {}, which is not followed: it is not a path"]


@pytest.mark.parametrize("secret", SECRETS)
def test_wherever_one_is_planted_nothing_of_it_is_left(secret: str) -> None:
    for name, sentence in itertools.product(named(secret), SENTENCES):
        if "?sig" in name and " " in secret and sentence != "{}":
            continue  # where such an address ends nobody can tell
        text = sentence.format(name)
        message = {"error": {"desc": text}, "return": [{"file": {"filename": text}}]}
        for shown in (
            json.dumps(secrets.without([text, {text: 1}])),
            secrets.masked(json.dumps(message).encode()).decode(),
        ):
            assert not any(half in shown for half in HALVES) and MASK in shown, (text, shown)


@pytest.mark.parametrize("given", [b'{"return": {"\\u0070assword": "%s"}}', b'{"return": "https:\\/\\/joe:%s@host"}'])
def test_however_a_message_spells_it(given: bytes) -> None:
    assert PLANTED.encode() not in secrets.masked(given % PLANTED.encode())


def test_what_is_hostile_takes_no_time_and_harms_nothing() -> None:
    for text in (
        "a://" * 20_000,
        "https://?" * 20_000,
        '{"' * 20_000,
        "json:{" * 20_000,
        "json:" + '{"a":' * 20_000,
        "password" * 9_000,
    ):
        assert isinstance(secrets.without(text), str)


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
