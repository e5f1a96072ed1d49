"""What a user can mend, told by a message alone; in a file that loads no library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def there_is(known: Iterable[str | int], sought: str | int) -> str:
    """The end of a message about a name that is not there: the nearest one, and all of them."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(sought), names, n=1)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return (f"did you mean {close[0]!r}? " if close else "") + f"there is: {shown or 'nothing'}"
