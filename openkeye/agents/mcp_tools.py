"""Tools of an MCP server as ours, in an environment: over a process's streams, or over HTTP.

What is pickled are settings and the calls so far. A connection is made anew where it is needed; a server that is a process has
then forgotten its state, so the calls are made once more, in their order.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openkeye.agents.model_client import Message
from openkeye.agents.tool_environment import CallCounts, ToolEnvironment
from openkeye.agents.tools import Tool, ToolError
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult


class McpServerError(OSError):
    """The server cannot be reached, or went away."""


@dataclass(frozen=True)
class McpServer:
    """Where a server is: a command that talks over its streams, or the address of one that is there."""

    command: tuple[str, ...] = ()
    url: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    # of the command's environment
    seconds: float = 60.0
    # for one call

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise InputError("MCP server: give a command, or a URL such as http://localhost:8000/mcp")


class Connection:
    """A client of a server, held by a task of its own: MCP's clients must be closed by the task that opened them."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self._wanted: asyncio.Queue[tuple[Callable[[Client], Awaitable[Any]], asyncio.Future[Any]]] = asyncio.Queue()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._serve())

    async def ask(self, question: "Callable[[Client], Awaitable[Any]]") -> Any:
        """What a function of the client returns.

        Raises:
            McpServerError: no connection, or no more.
        """
        await self._until(self._ready)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._wanted.put_nowait((question, answer))
        return await self._until(answer)

    async def _until(self, future: "asyncio.Future[Any]") -> Any:
        await asyncio.wait({future, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise McpServerError(f"MCP server {self._name}: {_reason(error) if error else 'the connection is closed'}")
        return future.result()

    @property
    def _name(self) -> str:
        return self.server.url or " ".join(self.server.command)

    async def _serve(self) -> None:
        from mcp import Client, MCPError, StdioServerParameters
        from mcp.types import CONNECTION_CLOSED

        where: Any = self.server.url
        if self.server.command:
            name, *arguments = self.server.command
            where = StdioServerParameters(command=name, args=arguments, env=dict(self.server.variables) or None)
        async with Client(where, read_timeout_seconds=self.server.seconds) as client:
            self._ready.set_result(None)
            while True:
                question, answer = await self._wanted.get()
                try:
                    result = await question(client)
                except MCPError as error:
                    if error.code == CONNECTION_CLOSED:
                        raise
                    answer.set_exception(ToolError(error.message))
                else:
                    answer.set_result(result)

    async def close(self) -> None:
        """End the connection, and with it the server's process."""
        self._task.cancel()
        await asyncio.wait({self._task})


def _reason(error: BaseException) -> str:
    """The first error of a group of them, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__} {error}".strip().splitlines()[0]


def check_mcp_is_installed() -> None:
    """InputError that says how to install the package where it is missing."""
    try:
        import mcp

        mcp.Client  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise InputError("MCP tools need the package mcp, 2.0 or newer: pip install 'mcp>=2.0'") from error


async def list_tools(connection: Connection) -> list[Tool]:
    """All tools of a server."""
    tools: list[Tool] = []
    cursor = None
    while True:
        page = await connection.ask(functools.partial(_page, cursor=cursor))
        tools += [
            Tool(tool.name, tool.description or "", tool.input_schema, _caller(connection, tool.name)) for tool in page.tools
        ]
        cursor = page.next_cursor
        if not cursor:
            return tools


async def _page(client: "Client", cursor: str | None) -> Any:
    return await client.list_tools(cursor=cursor)


def _caller(connection: Connection, name: str) -> Callable[..., Awaitable[str]]:
    async def call(**arguments: Any) -> str:
        return _text(await connection.ask(lambda client: client.call_tool(name, arguments)))

    return call


def _text(result: "CallToolResult") -> str:
    """A result in words; what is no text is named."""
    text = "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in result.content)
    if result.is_error:
        raise ToolError(text or "the server tells of an error and says nothing more")
    return text


Judge = Callable[[CallCounts], Mapping[str, float]]
# rewards of an episode from its calls and last message, "outcome" among them


class McpEnvironment(ToolEnvironment):
    """An environment of the tools that an MCP server has."""

    def __init__(self, messages: Sequence[Message], server: McpServer, judge: Judge, **options: Any) -> None:
        check_mcp_is_installed()
        super().__init__(messages, **options)
        self.server = server
        self.judge = judge
        self._connection: Connection | None = None
        self._tools: list[Tool] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_tools": []}

    async def begin(self) -> None:
        # A process begins anew; what a server over HTTP keeps is its own matter.
        await self.close()

    async def tools(self) -> Sequence[Tool]:
        if self._connection is None:
            self._connection = Connection(self.server)
            try:
                self._tools = await list_tools(self._connection)
                if self.server.command:
                    await self._repeat_calls()
            except BaseException:
                await self.close()
                raise
        return self._tools

    async def _repeat_calls(self) -> None:
        known = {tool.name: tool for tool in self._tools}
        for outcome in self.counts.outcomes:
            if outcome.name in known:
                with contextlib.suppress(ToolError):
                    await known[outcome.name].call(**outcome.arguments)

    async def score(self) -> Mapping[str, float]:
        return {**await super().score(), **self.judge(self.counts)}

    async def close(self) -> None:
        connection, self._connection, self._tools = self._connection, None, []
        if connection is not None:
            await connection.close()
