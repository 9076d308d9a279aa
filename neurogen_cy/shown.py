"""Values in messages: whole where they are short, cut where somebody put a megabyte there."""

from __future__ import annotations

import reprlib


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 4, 200, 200, 60
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 20

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to spell integers of more than 4300 digits.
        return f"an integer of {value.bit_length()} bits" if value.bit_length() > 2000 else repr(value)


shown = _Shown().repr
