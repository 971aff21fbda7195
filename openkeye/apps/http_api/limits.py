"""What one server gives to its clients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Limits that the command's options set."""

    max_body_bytes: int = 64 << 20
    max_concurrent: int = 64
    # chat requests that are read, wait or run at once; more are told to come back
    max_answer_tokens: int = 4096
    default_answer_tokens: int = 512
    # where a request does not say
    deadline_seconds: float = 600.0
    # from a request's submission to the end of its answer
    body_seconds: float = 60.0
    # in which a body must have come
