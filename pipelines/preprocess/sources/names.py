"""Names as keys: any bytes that a file system or an archive takes for a name, spelled as text that can be read back.

A name that is UTF-8 is its own key. Of another, each byte that is not UTF-8 is spelled %xHH with its two hex digits:

    b"caf\\xe9.png"  <->  "caf%xe9.png"

and so that nothing is spelled alike, a "%" that two such digits follow in the name itself is spelled %x25:

    b"50%xe9.png"  <->  "50%x25xe9.png"

Python holds such a byte in a string as a lone surrogate ("surrogateescape", as `os.fsdecode` and `tarfile` do).
"""

import re

BYTE = re.compile("[\udc80-\udcff]")
PERCENT = re.compile("%(?=x[0-9a-f]{2})")
SPELLED = re.compile("%x([0-9a-f]{2})")


def key_of(name: str) -> str:
    """The key of a name, which may hold surrogates."""
    return BYTE.sub(lambda match: f"%x{ord(match[0]) - 0xDC00:02x}", PERCENT.sub("%x25", name))


def name_of(key: str) -> str:
    """The name of a key, as Python calls the file."""
    return SPELLED.sub(lambda match: bytes.fromhex(match[1]).decode("utf-8", "surrogateescape"), key)
