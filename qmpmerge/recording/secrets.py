"""
Leaves out what must not be written down: data of secrets, passwords, whatever opens what is not ours to open.

They come in `object-add`, in URIs, and in options, of QEMU's command line as of the json: names in headers, and all of these
again in the middle of sentences. What cannot be told apart is left out with them: nobody misses a word as he does a password.
"""

import json
import re
from typing import Any

MASK = "(not shown)"

_MARK = (
    r"passw|passphrase|secret|credential|cookie|token|authorization|string=|\.data=|:key=|keyvalue|qom-set|://|"
    r"\bp(?:ass|in|wd?)=|\\[u/]"
)
_MARKED = re.compile(_MARK, re.IGNORECASE)
_MARKED_MESSAGE = re.compile(rf"{_MARK}|[\n\0]|\{{\s*'".encode(), re.IGNORECASE)
"""A message with none of these is written as it came, as most are: nothing is to be left out, and it is one line."""

_WORD = r"(?:password|passwd|passphrase|cookie|token|authorization)"
_KEYS = re.compile(rf"(?:.*[._-])?{_WORD}|secret|=keyvalue-pairs", re.IGNORECASE | re.DOTALL)
_ENDS_AT_OPTION = r"(?:,,|,(?!\s?[a-z][\w.-]*=)|[^,])*"
"""A value, up to the next option: a comma that was not doubled may still be of the value."""
_IS = r"\\*[\"']?\s*[:=]\s*"
_TEXT = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"({_WORD}{_IS}){_ENDS_AT_OPTION}",
        rf"((?:(?<![\w-])|_)(?:p(?:ass|in|wd?)|secret)=){_ENDS_AT_OPTION}",
        rf"(-{_WORD}\s+|set_password\s+\S+\s+|change\s+vnc\s+passw(?:or)?d\s+)(?s:.*)",
        rf"((?:^|,)string=|credential[\w.]{{0,64}}[:=]|object\.[\w.-]{{1,128}}\.data=){_ENDS_AT_OPTION}",
        r"(:key=)(?:\\.|[^:\\])*",
    )
]
_DATA = re.compile(rf"((?:^|[,.\s\"'])data{_IS}){_ENDS_AT_OPTION}", re.IGNORECASE)
_AUTHORITY = re.compile(r"(://)(?!/).*", re.DOTALL)
_WEB = re.compile(r"\b(?:https?|ftps?)://", re.IGNORECASE)
_QUERY = re.compile(r"(\?)\S+")
_OBJECT = re.compile(r"(?<=json:)\s*\{|\{(?=\s*\\*[\"'])", re.IGNORECASE)
_HELD = re.compile(r"\0(\d+)\0")


def masked(message: bytes) -> bytes:
    """A JSON object as one line of ASCII, without secrets; one that is nested too deeply is not shown at all."""
    message = message.strip()
    if message.isascii() and _MARKED_MESSAGE.search(message) is None:
        return message
    try:
        return json.dumps(without(json.loads(message))).encode()
    except RecursionError:
        return json.dumps({"left-out": "nested too deeply"}).encode()
    except ValueError:
        return json.dumps({"left-out": "no JSON"}).encode()


def without(value: Any, *, is_secret: bool = False) -> Any:
    """The same value of JSON, without secrets; `is_secret` says that it is part of an object that is one."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        is_secret = is_secret or str(value.get("qom-type", "")).startswith("secret")
        hidden = {"data"} if is_secret else {"value"} if _is_key(str(value.get("property", ""))) else set()
        return {
            _text(str(key)): MASK if _is_hidden(str(key), one, hidden) else without(one, is_secret=is_secret)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [without(one, is_secret=is_secret) for one in value]
    return value


def _is_key(name: str) -> bool:
    return name == "data" or _KEYS.fullmatch(name) is not None


def _is_hidden(key: str, value: object, hidden: set[str]) -> bool:
    """Yes and no are no secrets."""
    return value is not None and not isinstance(value, bool) and (key in hidden or _KEYS.fullmatch(key) is not None)


def _text(text: str) -> str:
    """What a file name, an option or a sentence holds: JSON objects by themselves, since they have their own rules."""
    objects: list[str] = []
    if "{" in text:
        text = _without_objects(text, objects)
    if _MARKED.search(text) is not None:
        text = _without_queries(_without_users(text))
        for pattern in (*_TEXT, _DATA) if "secret" in text.lower() else _TEXT:
            text = pattern.sub(rf"\1{MASK}", text)
    return _HELD.sub(lambda found: objects[int(found[1])], text) if objects else text


def _without_objects(text: str, objects: list[str]) -> str:
    """
    Those that can be read are put into `objects`, where a number between zeros stands for each. From one that cannot be read
    on nothing is shown: QEMU takes quotes and names that Python does not.
    """
    text, decoder, begin, parts = text.replace("\0", " "), json.JSONDecoder(), 0, list[str]()
    while (found := _OBJECT.search(text, begin)) is not None:
        parts.append(text[begin : found.end() - 1])
        try:
            value, begin = decoder.raw_decode(text, found.end() - 1)
            shown = json.dumps(without(value))
        except (ValueError, RecursionError):
            return _AUTHORITY.sub(r"\1", "".join(parts)) + MASK  # its password may be what looks like an object
        parts.append(f"\0{len(objects)}\0")
        objects.append(shown if _MARKED.search(text, found.end() - 1, begin) else text[found.end() - 1 : begin])
    return "".join((*parts, text[begin:]))


def _without_users(text: str) -> str:
    """Up to the last @, since a password may hold anything; what is behind it can be part of a query."""
    head, at, tail = text.rpartition("@")
    without = _AUTHORITY.sub(rf"\1{MASK}", head, count=1)
    if without != head and "?" in head:
        return without + re.sub(r"\A\S*", "", tail)
    return without + at + tail


def _without_queries(text: str) -> str:
    """Those of the web, which hold tokens; of an address by itself also what stands behind a blank."""
    found = _WEB.search(text)
    if found is None:
        return text
    if not found.start():
        address, mark, query = text.partition("?")
        return address + mark + (MASK if query else "")
    return text[: found.start()] + _QUERY.sub(rf"\1{MASK}", text[found.start() :])
