"""Encoded pictures by content, so that the next question about the same video encodes nothing again."""

from collections import OrderedDict

from torch import Tensor


class VisionCache:
    """Feature rows by picture hash, bounded in bytes, the longest unused dropped first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of the features that are kept."""
        return self._bytes

    def get(self, content_hash: str) -> Tensor | None:
        """[merged tokens, hidden] of a picture, or None."""
        features = self._features.get(content_hash)
        if features is not None:
            self._features.move_to_end(content_hash)
        return features

    def put(self, content_hash: str, features: Tensor) -> None:
        """Keep a picture's features; a copy, so that no larger tensor stays alive behind a view."""
        if content_hash in self._features:
            return
        self._features[content_hash] = features.clone()
        self._bytes += features.numel() * features.element_size()
        while self._bytes > self._max_bytes and len(self._features) > 1:
            _, dropped = self._features.popitem(last=False)
            self._bytes -= dropped.numel() * dropped.element_size()

    def clear(self) -> None:
        """Forget all pictures."""
        self._features.clear()
        self._bytes = 0
