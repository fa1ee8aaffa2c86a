"""OCR of a page image: pixels in, words with their places out, read by RapidOCR, which knows nothing of the model's answer.

It needs the extra `ocr`; its models are inside the package, so nothing is downloaded. A page of 1,280 visual tokens takes 2 to 3 s of one
CPU; more threads cost more CPU time and gain little, so that a process has one.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import JobError
from pipeline.evidence.text_layer import PageWords
from pipeline.records import Pixels

MIN_SCORE = 0.5
"""Words that the recognizer is less sure of are left out."""


MISSING = "OCR needs RapidOCR: pip install 'pipeline-documents[ocr]'"


def check_ocr(mode: str, file: Path) -> None:
    """Raise JobError where a job wants OCR, whose packages are not installed here."""
    if mode != "off" and not has_ocr():
        raise JobError(f"{file}: evidence.ocr is {mode}. {MISSING}", file, "evidence.ocr")


def require_ocr() -> None:
    """Raise JobError where the packages of OCR are not installed on this machine."""
    if not has_ocr():
        raise JobError(MISSING, key="evidence.ocr")


def has_ocr() -> bool:
    """Say whether the packages of OCR are installed."""
    return bool(find_spec("rapidocr") and find_spec("onnxruntime"))


def describe_reader() -> str:
    """Return the name and the version of what reads pages."""
    return f"rapidocr {version('rapidocr')}"


@lru_cache(maxsize=1)
def load_ocr() -> Any:
    """Return this process's OCR engine, loaded at the first call: 60 MB of models, half a second. Raises JobError without the extra."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        raise JobError(MISSING, key="evidence.ocr") from None
    threads = {f"EngineConfig.onnxruntime.{name}_op_num_threads": 1 for name in ("intra", "inter")}
    return RapidOCR(params={**threads, "Global.log_level": "error"})


def read_words_by_ocr(page_no: int, pixels: Pixels, width_pt: float, height_pt: float) -> PageWords:
    """Return the words that OCR reads on a page image, line by line; their boxes are in points of a page of this size.

    The image must show the page and nothing beside it. Raises JobError where the extra is not installed.
    """
    found = load_ocr()(np.ascontiguousarray(pixels[:, :, ::-1]), use_cls=False, return_word_box=True)  # it expects BGR
    lines = found.word_results if found.txts else ()
    words = [word for line in lines for word in line if word[0].strip() and word[1] >= MIN_SCORE]
    corners = np.array([box for _, _, box in words], np.float64).reshape(-1, 4, 2)
    height_px, width_px, _ = pixels.shape
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1) * (np.array([width_pt / width_px, height_pt / height_px] * 2))
    texts = ["".join(text.split()) for text, _, _ in words]
    return PageWords(page_no, texts, boxes, np.zeros(len(texts), np.uint8), is_ocr=True)
