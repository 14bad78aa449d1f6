"""A guest agent of ours, that speaks the protocol and can misbehave."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

FREEZE = "guest-fsfreeze-freeze"
THAW = "guest-fsfreeze-thaw"
STATUS = "guest-fsfreeze-status"

SILENCE = None
"""What a misbehaving command answers when it answers nothing."""

Answer = dict[str, object] | bytes | None


def refusal(words: str) -> Answer:
    return {"error": {"class": "GenericError", "desc": words}}


class FakeAgent:
    """
    A guest agent as the host sees it: one client at a time, commands strictly in order.

    `says` replaces the answer to a command; `stale` is in the channel before the next client comes, and `unfinished`
    in the agent's parser. `seen` counts the commands.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.filesystems = 2
        self.frozen = 0
        self.stale = b""
        self.unfinished = b""
        self.says: dict[str, Callable[[], Awaitable[Answer]]] = {}
        self.seen: Counter[str] = Counter()
        self.news = asyncio.Condition()
        self.more = asyncio.Event()
        self.clients = 0
        self._commands: asyncio.Queue[str] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        self._writer = writer
        writer.write(self.stale)
        working = asyncio.create_task(self._work())
        with contextlib.suppress(ConnectionError):
            while received := await reader.read(4096):
                self._take(received)
        working.cancel()
        await asyncio.wait([working])
        writer.close()
        async with self.news:
            self.clients -= 1
            self.news.notify_all()

    def _take(self, received: bytes) -> None:
        _, sentinel, last = received.rpartition(b"\xff")
        self.unfinished = last if sentinel else self.unfinished + received
        *lines, self.unfinished = self.unfinished.split(b"\n")
        for line in lines:
            self._commands.put_nowait(line.decode())
        self.more.set()

    async def _work(self) -> None:
        while True:
            line = await self._commands.get()
            try:
                command = json.loads(line)
            except ValueError:
                self._write(refusal("Invalid JSON syntax"))
                continue
            name = command["execute"]
            answer = await self.says[name]() if name in self.says else self.obey(name, command)
            self._write(answer)
            async with self.news:
                self.seen[name] += 1
                self.news.notify_all()

    def obey(self, name: str, command: dict[str, dict[str, object]] | None = None) -> Answer:
        if name == "guest-sync-delimited" and command is not None:
            return b"\xff" + json.dumps({"return": command["arguments"]["id"]}).encode() + b"\n"
        if name == STATUS:
            return {"return": "frozen" if self.frozen else "thawed"}
        if name == FREEZE:
            self.frozen = self.filesystems
            return {"return": self.frozen}
        assert name == THAW
        thawed, self.frozen = self.frozen, 0
        return {"return": thawed}

    def answers(self, name: str, *answers: Answer) -> None:
        """The next times, this is what the command answers, without doing anything; then it obeys again."""
        left = list(answers)

        async def answer() -> Answer:
            return left.pop(0) if left else self.obey(name)

        self.says[name] = answer

    def always_answers(self, name: str, answer: Answer) -> None:
        async def always() -> Answer:
            return answer

        self.says[name] = always

    def _write(self, answer: Answer) -> None:
        assert self._writer is not None
        if answer is not None:
            self._writer.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")

    def die(self) -> None:
        assert self._writer is not None
        self._writer.close()

    async def is_alone(self) -> None:
        """Return when no client, and no switch of one, holds the connection."""
        async with self.news:
            await self.news.wait_for(lambda: self.clients == 0)

    async def has_seen(self, name: str, times: int = 1) -> None:
        async with self.news:
            await self.news.wait_for(lambda: self.seen[name] >= times)


@contextlib.asynccontextmanager
async def serving(path: str) -> AsyncIterator[FakeAgent]:
    """An agent that is asked there, until its last client, and that one's switch, has gone."""
    fake = FakeAgent(path)
    server = await asyncio.start_unix_server(fake.serve, fake.path)
    yield fake
    await fake.is_alone()
    server.close()
    await server.wait_closed()
