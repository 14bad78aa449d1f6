"""Words that programs choke on: as arguments, and as names in the headers of images."""

from collections.abc import Iterator

WORDS = [
    *("", " ", ".", "..", "/", "-", "a\nb", "\t", "\r", "\x1b[31mred\x07", "\u202e", "\x7f", "é虚", "\udcff\udcfe"),
    *("a b'c\"d", "$(touch x)", "`id`", "{}", "{0.__class__}", "%s", "x" * 300, "x" * 5000, "x/" * 3000),
    *("pid:", "pid:²", "pid:٣", "pid:-1", "pid:0", "pid:1", "pid:" + "9" * 30, "pid:" + "9" * 5000),
    *("tcp:", "tcp::", "tcp:localhost:", "tcp:localhost:²", "tcp:localhost:99999", "tcp:localhost:" + "9" * 5000),
    *("tcp:a..b:5", "tcp:" + "h" * 300 + ":5", "tcp:\udcff:5", "tcp:é" + "h" * 80 + ":5", "tcp:\n:5", "tcp:[::1:5"),
    *("unix:", "unix:.", "unix:\udcff", "unix:" + "x" * 5000, "@abstract", "json:{", 'json:{"filename":"a\\u0000b"}'),
    *("[2]", "[²]", "[٢]", "[-1]", "[]", "[99999999999999999999]", "c.qcow2[²]", "nbd://x"),
    *("0", "²", "١٢", "nan", "inf", "-inf", "1e400", "9" * 5000, "1." + "9" * 400 + "T", "1." + "9" * 4000),
    *("=", "=x", "x=", "x=y=z", "--", "-h", "--json", "c.qcow2", "fifo", "folder", "loop", "/dev/null", "/dev/full"),
]
"""Surrogates stand for bytes that are no UTF-8."""


def command_lines(word: str) -> Iterator[list[str]]:
    """The word wherever the command line takes one, in a folder with a chain whose active image is ``c.qcow2``."""
    yield from ([word], [word, "c.qcow2"], ["completion", word], [word, "chain"], ["help", word], ["merge", word, word])
    yield from (["job", word, "follow", word], ["snapshot", word, word, word], ["blockjob", "x", f"--diskspec={word}"])
    yield from (["chain", "nope", word], ["chain", word, "c.qcow2"], ["graph", "c.qcow2", word])
    for command in (
        "disks",
        "chain",
        "graph",
        "active",
        "plan",
        "commit",
        "pull",
        "doctor",
        "jobs",
        "recover",
        "clean",
    ):
        yield [command, word]
    yield from (["job", word, "x", "follow"], ["job", "c.qcow2", word, "follow"], ["job", "nope", "x", word])
    yield from (
        ["job", "nope", "x", "speed", word],
        ["chain", "c.qcow2", word],
        ["commit", "c.qcow2", word, "--dry-run"],
        ["pull", "c.qcow2", word, "--dry-run"],
        ["plan", "c.qcow2", word],
        ["plan", "c.qcow2", "--speed", word],
    )
    for option in ("--base", "--top", "--keep", "--speed", "--timeout", "--force", "--merged-files"):
        yield ["commit", "c.qcow2", "--dry-run", option, word]
    yield ["commit", "c.qcow2", "--dry-run", "--converge-pause", word]
    yield from (["commit", "c.qcow2", "--dry-run", "--allow", word], ["active", word, "--json"])
    if word != "fifo":  # as of a shell's `<(...)`, whose writer is waited for
        yield ["chain", "c.qcow2", "--secret", word]
    yield ["chain", "c.qcow2", "--format", word]
    yield from (["chain", "c.qcow2", "--record", word], ["clean", ".", "--dry-run", "--record", word])
    yield from (["explain", word], ["replay", word, "--qemu", "nope"], ["replay", "c.qcow2", "--qemu", word])
    yield ["replay", "c.qcow2", "--socket", word]
    if word != "/":  # which takes as long as the machine has files
        yield from (["doctor", "c.qcow2", "--search", word], ["commit", "c.qcow2", "--dry-run", "--search", word])
    yield ["clean", ".", "--dry-run", "--older-than", word]
    for option in ("--keep", "--parallel", "--speed", "--timeout", "--direction"):
        yield ["tidy", "c.qcow2", "--keep", "1", "--dry-run", option, word]
    if word != "/":
        yield ["tidy", word, "--keep", "1", "--dry-run"]
    yield from (["snapshot", word, "a=b"], ["snapshot", "c.qcow2", word], ["snapshot", "c.qcow2", f"{word}={word}"])
    yield from (["snapshot", "c.qcow2", f"nope={word}"], ["recover", "c.qcow2", "--use", word], ["clean", ".", word])
    yield ["snapshot", "c.qcow2", "nope=x", "--quiesce", "--agent", word]


NAMES = [
    *(word.encode(errors="surrogateescape") for word in WORDS if 0 < len(word) < 1000),
    *(b"x" * 1023, b"a\0b", b"\xff\xfe", b"base.raw\0", b"../outside/precious.raw", b"/etc/shadow", b"file:base.raw"),
    *(b"nbd+unix:///x?socket=fifo", b"ssh://x/y", b"http://127.0.0.1:1/x", b"fat:rw:.", b"blkdebug::base.raw"),
    b'json:{"filename":"a\\u0000b"}',
    b'json:{"driver":"file","filename":"a\\ud800b"}',
    b'json:{"driver":"qcow2","file":{"driver":"file","filename":"/x\\u0000"}}',
    b'json:{"driver":"raw","file":{"driver":"file","filename":"\\ud800"}}',
    b'json:{"driver":"raw","file":{"driver":"file","filename":"../outside/precious.raw"}}',
    b'json:{"driver":"raw","offset":1e999,"size":NaN,"file":{"driver":"file","filename":"/x"}}',
    b'json:{"driver":"raw","offset":' + b"9" * 600 + b',"file":{"driver":"file","filename":"/x"}}',
    b'json:{"driver":"raw","file":{"driver":"file","filename":"base.raw","filename":"/etc/shadow"}}',
    b'json:{"driver":["raw"],"file":{"driver":{},"filename":[]}}',
    b'json:{"driver":"raw","file":[]}',
    *(b"json:" + b'{"file":' * 120, b"json:" + b"[" * 1000, b"json:null", b"json:7", b"json:\xff", b"json:"),
]
"""What a header may name."""
