"""Format check of `iri` and `iri-reference` (RFC 3987).

The package that jsonschema uses for them, rfc3987-syntax, compiles its grammar when it is imported: 1.5 s of CPU time in every process
that imports jsonschema, which each process of Ray does. So it is not installed.
"""

from __future__ import annotations

import re

from rfc3986_validator import validate_rfc3986

PLANES = range(0x10000, 0xE0000, 0x10000)
UCSCHAR = "\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef\U000e1000-\U000efffd" + "".join(f"{chr(p)}-{chr(p + 0xFFFD)}" for p in PLANES)
"""Characters that an IRI may have wherever a URI may have percent-encoded ones (RFC 3987, section 2.2), for a regular expression."""
IPRIVATE = "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"
"""Characters that only its query may have."""
QUERY = re.compile(r"([^?#]*\?)([^#]*)")


def is_iri(text: object, rule: str = "URI") -> bool:
    """Say whether a text, or any other value, is an IRI: percent-encoded it is a URI (RFC 3987, section 3.1), or a `URI_reference`."""
    if not isinstance(text, str):
        return True
    if query := QUERY.match(text):
        text = query[1] + re.sub(f"[{IPRIVATE}]", "%20", query[2]) + text[query.end() :]
    return "\n" not in text and bool(validate_rfc3986(re.sub(f"[{UCSCHAR}]", "%20", text), rule))


def is_iri_reference(text: object) -> bool:
    """Say whether a text, or any other value, is an IRI or relative to one."""
    return is_iri(text, "URI_reference")
