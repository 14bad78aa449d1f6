"""
Leaves out what must not be written down: data of secrets, passwords, whatever opens what is not ours to open.

They come in `object-add`, in URIs, and in options, of QEMU's command line as of the json: names in headers.
"""

import json
import re
from typing import Any

MASK = "(not shown)"

MARKS = (b"object-add", b"passw", b"secret", b"cookie", b"://", b":key=", b"\n", b"\0")
"""A message with none of these is written as it came, as most are: nothing is to be left out, and it is one line."""

_KEYS = re.compile(r"(?:.*[.-])?(?:password|passwd|cookie)", re.IGNORECASE)
_OPTION = re.compile(r"((?:^|[,.?&:-])(?:password|passwd|cookie)=)(?:[^,]|,,)*", re.IGNORECASE)
_DATA = re.compile(r"((?:^|[,.])data=)(?:[^,]|,,)*")
_FIRMWARE = re.compile(r"((?:^|,)(?:string=|value=io\.systemd\.credential[^:=]*[:=]))(?:[^,]|,,)*")
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^/?#\s:%@\"']*)[:%][^/?#\s\"']*@", re.IGNORECASE)
_QUERY = re.compile(r"(\b(?:https?|ftps?)://[^\s?\"']*\?)[^\s\"',]*", re.IGNORECASE)
_RBD = re.compile(r"(\brbd:.*?:key=)(?:\\.|[^:\\])*")
_TEXT = (_OPTION, _FIRMWARE, _USER, _QUERY, _RBD)


def masked(message: bytes) -> bytes:
    """A JSON object as one line of ASCII, without secrets; one that is nested too deeply is not shown at all."""
    message = message.strip()
    if message.isascii() and not any(mark in message for mark in MARKS):
        return message
    try:
        return json.dumps(without(json.loads(message))).encode()
    except RecursionError:
        return json.dumps({"left-out": "nested too deeply"}).encode()


def without(value: Any) -> Any:
    """The same value of JSON, without secrets."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        is_secret = str(value.get("qom-type", "")).startswith("secret")
        return {key: MASK if _is_hidden(key, one, is_secret) else without(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without(one) for one in value]
    return value


def _is_hidden(key: str, value: object, is_secret: bool) -> bool:
    return isinstance(value, str) and (_KEYS.fullmatch(key) is not None or (is_secret and key == "data"))


def _text(text: str) -> str:
    """What a file name, an option or a sentence holds; one of those can be a JSON object."""
    start = text.removeprefix("json:")
    if start[:1] == "{":
        try:
            return text[: len(text) - len(start)] + json.dumps(without(json.loads(start)))
        except ValueError:  # then it is none
            pass
    for pattern in _TEXT:
        text = pattern.sub(_mask, text)
    return _DATA.sub(_mask, text) if "secret" in text else text


def _mask(found: "re.Match[str]") -> str:
    return f"{found[1]}:{MASK}@" if found.re is _USER else f"{found[1]}{MASK}"
