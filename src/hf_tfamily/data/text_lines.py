"""Text files: read as UTF-8 without its byte order mark, and cut into lines at LF, CRLF and CR alone.

`str.splitlines` also cuts at form feeds, NEL (U+0085) and U+2028, which stand inside lines of real texts.
"""

import codecs
import re
from pathlib import Path

LINE_END = re.compile(r"\r\n|\n|\r")
# Longer marks first: UTF-32's begins like UTF-16's.
OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError, naming the file, where it is in another encoding."""
    content = read_text_bytes(path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: byte {content[error.start]:#04x} at {error.start} begins no character. If it is "
            f"Latin-1, say, make it UTF-8: iconv -f LATIN1 -t UTF-8 {path} > new"
        ) from error


def read_text_bytes(path: str | Path) -> bytes:
    """The bytes of a text file behind UTF-8's byte order mark. Raises ValueError if the mark is another encoding's."""
    content = Path(path).read_bytes()
    for mark, encoding in OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path} is {encoding} text; make it UTF-8: iconv -f {encoding} -t UTF-8 {path} > new")
    return content.removeprefix(codecs.BOM_UTF8)


def split_lines(text: str) -> list[str]:
    """The lines of a text, without their ends; behind the last end there is no further line."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]
