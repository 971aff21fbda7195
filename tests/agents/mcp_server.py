"""A small real MCP server with state: over its streams, or over HTTP on a port."""

import sys

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("counter")
counts: dict[str, int] = {}


@server.tool()
def add(name: str, amount: int = 1) -> str:
    """Add to a counter."""
    if amount < 0:
        raise ToolError("only upwards")
    counts[name] = counts.get(name, 0) + amount
    return f"{name} is {counts[name]}"


@server.tool()
def crash() -> str:
    """Leave at once."""
    import os

    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
