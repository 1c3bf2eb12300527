"""Files of text that people write."""

from pathlib import Path


def read_text(path: str | Path) -> str:
    """A file's text.

    Args:
      path: the file, in UTF-8.

    Raises:
      OSError: it cannot be read.
      ValueError: it is in another encoding, or no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as one") from error
