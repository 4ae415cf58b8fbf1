"""A text with spaces, digits and wide characters, for tests of texts and sequences."""

from __future__ import annotations

LINES = "".join(f"Line {n} of the text, with  spaces, digits {n * 7919}, ünïcödé and 漢字 🙂.\n\n" for n in range(200))
