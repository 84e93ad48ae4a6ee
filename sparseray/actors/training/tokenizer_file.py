"""A tokenizer.json as it is read wherever text becomes tokens or tokens become text."""

from pathlib import Path

from tokenizers import Tokenizer

from sparseray.errors import DataError


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return Tokenizer.from_file(str(path))
    except BaseException as error:
        # The library raises nothing narrower than Exception, and panics, which is none, over some damages.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} is not a tokenizer.json of the tokenizers library ({said}); restore it"
        ) from None
