"""The HTTP server behind `openkeye serve`: an API in OpenAI's shape, metrics and a page. Read `application.py` first."""
