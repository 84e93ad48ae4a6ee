"""Which documents a preparation keeps: the published filters for code, and one of several near duplicates.

Filters are DeepSeek-Coder-V2's (section 2 of its report, which takes them from DeepSeek-Coder): line lengths, share of
letters, XML, HTML, JSON and YAML. Near duplicates are found by MinHash over runs of five words; of alike documents
the first that is read stays. Both passes keep the same documents.
"""

import re
from typing import Any

from sparseray.errors import DataError
from sparseray.jobs.tokens.corpus import Document
from sparseray.jobs.tokens.languages import PROSE, language_of

MEAN_LINE, LONGEST_LINE = 100, 1000
LEAST_LETTERS = 0.25
XML_HEAD = 100
LEAST_VISIBLE, LEAST_VISIBLE_SHARE = 100, 0.2
DATA_SIZES = (50, 5000)
PERMUTATIONS, SHINGLE = 128, 5
_TAGS = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)
_WORDS = re.compile(r"\w+")


def code_complaint(name: str, text: str) -> str:
    """Say by which rule a document is no good code; empty where it is, and for prose.

    Args:
        name: of the file; its end tells the language.
        text: of the document.
    """
    language, lines = language_of(name), text.splitlines() or [""]
    if language in PROSE:
        return ""
    if sum(map(len, lines)) / len(lines) > MEAN_LINE:
        return "long lines on average"
    if max(map(len, lines)) > LONGEST_LINE:
        return "a very long line"
    if sum(map(str.isalpha, text)) < LEAST_LETTERS * len(text):
        return "few letters"
    if language != "XSLT" and "<?xml version=" in text[:XML_HEAD]:
        return "XML"
    if language == "HTML":
        visible = len(" ".join(_TAGS.sub(" ", text).split()))
        if visible < LEAST_VISIBLE or visible < LEAST_VISIBLE_SHARE * len(text):
            return "little visible text"
    if language in ("JSON", "YAML") and not DATA_SIZES[0] <= len(text) <= DATA_SIZES[1]:
        return "data of another size"
    return ""


class Selection:
    """Says of each document why it is left out, in two passes alike.

    Args:
        code_filters: apply the filters to documents of programming languages.
        near_duplicates: similarity (Jaccard, of runs of five words) from which a document is one; 0 keeps all.

    Raises:
        DataError: the library that finds near duplicates is not there.
    """

    def __init__(self, *, code_filters: bool = False, near_duplicates: float = 0.0) -> None:
        if not (near_duplicates == 0 or 0.5 <= near_duplicates <= 1):
            raise DataError(
                f"near_duplicates={near_duplicates} is outside [0.5, 1]; try 0.85, or 0 to keep all"
            )
        self.code_filters = code_filters
        self._found = _Similar(near_duplicates) if near_duplicates else None
        self._dropped: set[str] = set()

    def first(self, document: Document) -> str:
        """Why a document is left out, in the order of the first pass; empty to keep it."""
        why = code_complaint(document.name, document.text) if self.code_filters else ""
        if not why and self._found is not None and self._found.is_known(document):
            self._dropped.add(document.name)
        return why or self._duplicate(document)

    def again(self, document: Document) -> str:
        """The same in the second pass."""
        why = code_complaint(document.name, document.text) if self.code_filters else ""
        return why or self._duplicate(document)

    def _duplicate(self, document: Document) -> str:
        return "near duplicates" if document.name in self._dropped else ""


class _Similar:
    """Documents that were kept, by MinHash.

    Args:
        threshold: similarity from which a document is known.
    """

    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError:
            raise DataError(
                "finding near duplicates needs the package datasketch; pip install 'sparseray[dedup]' or datasketch"
            ) from None
        self._threshold, self._library = threshold, datasketch
        self._index: Any = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._kept: dict[str, Any] = {}

    def is_known(self, document: Document) -> bool:
        """Whether a document is much like one that was kept; otherwise it is kept from now on."""
        words = _WORDS.findall(document.text)
        runs = {" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}
        sketch: Any = self._library.MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([run.encode() for run in sorted(runs)])
        alike = self._index.query(sketch)
        if any(sketch.jaccard(self._kept[name]) >= self._threshold for name in alike):
            return True
        self._index.insert(document.name, sketch, check_duplication=False)
        self._kept[document.name] = sketch
        return False
