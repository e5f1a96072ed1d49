"""What a user can mend, told by a message alone; in a file that loads nothing."""

from __future__ import annotations


class UserError(ValueError):
    """Something that a person can mend; the message says how."""


class ConfigError(UserError):
    """A setting, option or environment that cannot work; the message names it and the fix."""


class DataError(UserError):
    """A mistake in the user's data; the message names the file, the line and the fix."""


class ArtifactError(UserError):
    """The folder is no sound artifact; the message names the file and the reason."""


class EncoderError(UserError):
    """The encoder cannot be had; the message says where it was looked for and what to do."""


class TrainingError(UserError):
    """Training cannot go on; the message says where it stopped and what to try."""


class TextError(UserError):
    """A text that cannot be predicted for."""
