"""Byte-level tokenizer of printable ASCII for tests, made with `tokenizers` alone: transformers and torch take seconds to import."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
ORDINARY = ('{"invoice_number":', '"invoice_number":', ',"total":', "null", "Return the JSON object for this document.")
VOCABULARY = 192
"""Wider than the tokenizer, as published embeddings are padded."""


def build_tokenizer() -> Tokenizer:
    """Return a tokenizer that spells every text letter by letter except `ORDINARY`; it drops what is not printable ASCII or a newline."""
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [as_bytes.pre_tokenize_str(chr(code))[0][0] for code in (10, *range(32, 127))]
    words = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    words.pre_tokenizer = as_bytes
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    words.add_tokens([AddedToken(token, normalized=False) for token in ORDINARY])
    return words
