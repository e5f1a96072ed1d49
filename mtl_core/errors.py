"""What a user can mend, told by a message alone; in a file that loads nothing."""

from __future__ import annotations


class ArtifactError(ValueError):
    """The folder is no sound artifact; the message names the file and the reason."""


class EncoderError(ValueError):
    """The encoder cannot be had; the message says where it was looked for and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and what to try."""


class TextError(ValueError):
    """A text that cannot be predicted for."""
