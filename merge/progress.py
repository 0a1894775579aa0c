"""What a build tells while it works, for whoever listens."""

from __future__ import annotations


class Progress:
    """What a build tells while it works. This one keeps silent; the command line has one that draws."""

    def begin(self, title: str, nbytes: int, tensors: int) -> None:
        """Begin a stretch of work over so many bytes and tensors."""

    def advance(self, nbytes: int, tensors: int = 0) -> None:
        """Tell that so many more are done. Called from any thread."""

    def tell(self, text: str) -> None:
        """Tell something that the user should know at once."""
