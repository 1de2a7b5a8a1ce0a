"""What an engine's configuration says to adamix: `{"adamix": {...}}` beside its own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from adamix.errors import AdamixError

KEY = "adamix"


@dataclass(frozen=True)
class EngineOptions:
    """The object under the key `adamix`; an empty one takes these defaults."""

    capacity_bytes: int | None = None  # of a worker's slots; None: 1/15 of the 16-bit layers a slot
    max_rank: int | None = None  # None: what 1 bit a weight pays for at 2 bits
    strict: bool = False  # refuse fine-tunes of which something must be left out
    verify: str | None = "sampled"  # or "full", or None: how a delta's base is compared

    def __post_init__(self) -> None:
        for name in ("capacity_bytes", "max_rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise AdamixError(f"{KEY}.{name} must be a whole number from 1 on, got {value!r}")
        if not isinstance(self.strict, bool):
            raise AdamixError(f"{KEY}.strict must be true or false, got {self.strict!r}")
        if self.verify not in ("sampled", "full", None):
            raise AdamixError(f'{KEY}.verify must be "sampled", "full" or null, '
                              f"got {self.verify!r}")

    @classmethod
    def of(cls, additional: Mapping[str, object]) -> EngineOptions:
        """From an engine's additional configuration.

        Raises:
            AdamixError: an unknown option, or a value that is none.
        """
        given = additional[KEY]
        if not isinstance(given, Mapping):
            raise AdamixError(f"{KEY} must be an object with options, got {given!r}")
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise AdamixError(f"{KEY} has no option {name!r}; it has {', '.join(known)}")
        return cls(**given)


def wants_adamix(additional: object) -> bool:
    """Whether an engine's additional configuration asks for adamix."""
    return isinstance(additional, Mapping) and KEY in additional
