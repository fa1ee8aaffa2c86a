"""Small files as strangers, scanners and attackers send them, made by hand. Knows nothing of what shall become of them.

`files()` is a dict of name -> bytes; `test_hostile.py` has the outcome of each. None is larger than 4 MB; what they
would grow to, if they were let, is said beside them.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import zipfile
import zlib
from functools import cache
from typing import Any

import numpy as np
import pymupdf
from PIL import Image

from tests.support.pdfs import encode_image, make_endless_pdf, make_page_pdf, make_pages_pdf, make_pdf, make_stream

SQUARE = make_stream(b"0 0 50 50 re f")
CATALOGUE = "<</Type/Catalog/Pages 2 0 R>>"
LEAF = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]>>"
SPEECH = "<</S/JavaScript/JS(while\\(true\\){};app.alert\\('run'\\))>>"
HELVETICA = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
PASSWORD = "open sesame"


@cache
def make_hostile_files() -> dict[str, bytes]:
    """Return every file by its name."""
    return {**pdf_structures(), **pdf_contents(), **pdf_images(), **pdf_intentions(), **images(), **bombs(), **strangers()}


def rng_bytes(count: int) -> bytes:
    return random.Random(7).randbytes(count)


# ---- PDFs ---------------------------------------------------------------------------------------------------------


def tree(pages: str, *objects: str | bytes) -> bytes:
    """Return a PDF with this root of its page tree, object 2, and more objects from number 3 on."""
    return make_pdf(CATALOGUE, pages, *objects)


def boxed(media_box: str) -> bytes:
    leaf = f"<</Type/Page/Parent 2 0 R{media_box}/Contents 4 0 R>>"
    return tree("<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, SQUARE)


def pdf_structures() -> dict[str, bytes]:
    """Broken and lying cross-reference tables, page trees and boxes."""
    two = make_pages_pdf(2)
    nested = [f"<</Type/Pages/Parent {n - 1} 0 R/Kids[{n + 1} 0 R]/Count 1>>" for n in range(3, 3000)]
    kids = "<</Type/Pages/Kids[3 0 R {}4 0 R]/Count {}>>"
    return {
        "xref-offsets.pdf": two.replace(b"0000000", b"9999999"),
        "xref-circle.pdf": two.replace(b"/Size", b"/Prev %d/Size" % two.index(b"xref\n")),
        "xref-frees-the-tree.pdf": two.replace(b"0000000054 00000 n", b"0000000054 00000 f"),
        "xref-missing.pdf": two[: two.index(b"xref\n")],
        "startxref-nowhere.pdf": two.replace(b"startxref\n", b"startxref\n99999"),
        "truncated.pdf": two[: len(two) // 2],
        "header-only.pdf": b"%PDF-1.7\n",
        "garbage-behind-header.pdf": b"%PDF-1.7\n" + rng_bytes(3000),
        "junk-before-header.pdf": b"\x1b%-12345X@PJL ENTER LANGUAGE=PDF\r\n" * 20 + two,
        "no-root.pdf": two.replace(b"/Catalog", b"/Katalog").replace(b"/Root 1 0 R", b""),
        "zero-pages.pdf": tree("<</Type/Pages/Kids[]/Count 0>>"),
        "kids-missing.pdf": tree("<</Type/Pages/Count 3>>"),
        "tree-missing.pdf": make_pdf("<</Type/Catalog>>"),
        "tree-is-a-page.pdf": tree(LEAF),
        "tree-in-a-circle.pdf": tree("<</Type/Pages/Kids[2 0 R 3 0 R 2 0 R]/Count 3>>", LEAF),
        "tree-of-circles-only.pdf": tree("<</Type/Pages/Kids[3 0 R]/Count 9>>", "<</Type/Pages/Parent 2 0 R/Kids[2 0 R 3 0 R]/Count 9>>"),
        "tree-3000-deep.pdf": tree("<</Type/Pages/Kids[3 0 R]/Count 1>>", *nested, LEAF),
        "count-zero.pdf": tree(kids.format("", 0), LEAF, LEAF),
        "count-missing.pdf": tree("<</Type/Pages/Kids[3 0 R 4 0 R]>>", LEAF, LEAF),
        "count-negative.pdf": tree(kids.format("", -5), LEAF, LEAF),
        "count-too-small.pdf": tree(kids.format("", 1), LEAF, LEAF),
        "count-a-billion.pdf": tree(kids.format("", 10**9), LEAF, LEAF),
        "kid-missing.pdf": tree(kids.format("99 0 R null ", 4), LEAF, LEAF),
        "parent-in-a-circle.pdf": tree("<</Type/Pages/Kids[3 0 R]/Count 1>>", "<</Type/Page/Parent 3 0 R/MediaBox[0 0 200 100]>>"),
        "pages-10000.pdf": make_pages_pdf(10_000),
        "box-of-nothing.pdf": boxed("/MediaBox[0 0 0 0]"),
        "box-of-10-million-points.pdf": boxed("/MediaBox[0 0 10000000 10000000]"),
        "box-negative.pdf": boxed("/MediaBox[200 100 -200 -100]"),
        "box-of-words.pdf": boxed("/MediaBox[nan /a (b) null]"),
        "box-infinite.pdf": boxed("/MediaBox[-1e999 -1e999 1e999 1e999]"),
        "box-missing.pdf": boxed(""),
        "box-a-line.pdf": boxed("/MediaBox[0 0 100000 1]"),
        "userunit-huge.pdf": make_page_pdf(extra="/UserUnit 1e30"),
        "arrays-200000-deep.pdf": make_page_pdf(extra="/X " + "[" * 200_000),
        "dictionaries-100000-deep.pdf": make_page_pdf(extra="/X " + "<</A " * 100_000),
        "length-of-itself.pdf": drawn(b"<</Length 4 0 R>>stream\n0 0 9 9 re f\nendstream"),
        "length-a-lie.pdf": drawn(b"<</Length 999999999>>stream\n0 0 9 9 re f\nendstream"),
        "object-number-8-million.pdf": make_pages_pdf(1)[: make_pages_pdf(1).index(b"xref")] + b"8388606 0 obj null endobj\n",
        "size-a-billion.pdf": make_pages_pdf(1).replace(b"/Size 4", b"/Size 1999999999"),
    }


def drawn(content: bytes) -> bytes:
    """Return a PDF of one page with this object as its content stream."""
    return tree("<</Type/Pages/Kids[3 0 R]/Count 1>>", "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R>>", content)


def form(content: bytes, resources: str) -> bytes:
    return make_stream(content, f"/Type/XObject/Subtype/Form/BBox[0 0 200 100]/Resources<<{resources}>>")


def drawing(content: bytes, entries: str = "", resources: str = "", *objects: str | bytes) -> bytes:
    """Return a PDF of one page with this content stream, of these entries, and more objects from number 5 on."""
    leaf = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Resources<<{resources}>>>>"
    return make_pdf(CATALOGUE, "<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, make_stream(content, entries), *objects)


def pressed(block: bytes) -> bytes:
    """Return a piece of a deflated stream. It may be repeated: huge streams are made in a moment, and deflate well themselves."""
    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    return press.compress(block) + press.flush(zlib.Z_FULL_FLUSH)


def deflated(*pieces: bytes) -> bytes:
    return b"\x78\x9c" + b"".join(pieces) + b"\x03\x00"


def pdf_contents() -> dict[str, bytes]:
    """What a page may tell a renderer to do."""
    xobject = "/XObject<</X 5 0 R>>"
    font = "/Font<</F 5 0 R>>"
    text = b"BT /F 20 Tf 10 40 Td (Total 12) Tj ET"
    gigabyte = pressed(b" " * 2**20) * 1024
    words = b" ".join(b"1 0 0 1 %d %.1f Tm (a) Tj" % (n % 190, n / 190 / 2) for n in range(30_000))
    glyph = make_stream(b"1000 0 d0 BT /F 1 Tf (a) Tj ET")
    type3 = "<</Type/Font/Subtype/Type3/FontBBox[0 0 9 9]/FontMatrix[1 0 0 1 0 0]/CharProcs<</a 6 0 R>>/FirstChar 97/LastChar 97"
    pattern = "/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 200 100]/XStep 200/YStep 100/Resources<</Pattern<</P 5 0 R>>>>"
    return {
        "form-draws-itself.pdf": drawing(b"/X Do", "", xobject, form(b"0 0 9 9 re f /X Do", xobject)),
        "forms-without-end.pdf": make_endless_pdf(),
        "pattern-of-itself.pdf": drawing(
            b"/Pattern cs /P scn 0 0 200 100 re f", "", "/Pattern<</P 5 0 R>>", make_stream(b"/Pattern cs /P scn 0 0 9 9 re f", pattern)
        ),
        "glyph-of-itself.pdf": drawing(
            b"BT /F 9 Tf (a) Tj ET", "", font, f"{type3}/Encoding<</Differences[97/a]>>/Widths[9]/Resources<<{font}>>>>", glyph
        ),
        "soft-mask-of-itself.pdf": drawing(
            b"/G gs 0 0 9 9 re f", "", "/ExtGState<</G 5 0 R>>", "<</SMask<</S/Alpha/G 6 0 R>>>>", form(b"/G gs", "/ExtGState<</G 5 0 R>>")
        ),
        "states-a-million.pdf": drawing(zlib.compress(b"q " * 10**6), "/Filter/FlateDecode"),
        "operators-unknown.pdf": drawing(rng_bytes(5000)),
        "font-missing.pdf": drawing(text, "", font, "<</Type/Font/Subtype/TrueType/BaseFont/NoSuchFont/Encoding/WinAnsiEncoding>>"),
        "font-not-there.pdf": drawing(text, "", "/Font<</F 99 0 R>>"),
        "font-of-garbage.pdf": drawing(
            text,
            "",
            font,
            "<</Type/Font/Subtype/TrueType/BaseFont/A/FontDescriptor<</Type/FontDescriptor/FontName/A/Flags 32/FontFile2 6 0 R>>>>",
            make_stream(b"\0\1\0\0" + rng_bytes(2000)),
        ),
        "cmap-of-itself.pdf": drawing(
            text,
            "",
            font,
            "<</Type/Font/Subtype/Type0/BaseFont/A/Encoding 6 0 R/ToUnicode 6 0 R/DescendantFonts[7 0 R]>>",
            make_stream(b"begincmap endcmap", "/Type/CMap/CMapName/A/UseCMap 6 0 R"),
            "<</Type/Font/Subtype/CIDFontType2/BaseFont/A/CIDSystemInfo<</Registry(A)/Ordering(B)/Supplement 0>>>>",
        ),
        "words-30000.pdf": drawing(zlib.compress(b"BT /F .1 Tf %b ET" % words), "/Filter/FlateDecode", font, HELVETICA),
        "word-of-a-million-letters.pdf": drawing(
            zlib.compress(b"BT /F .0001 Tf (" + b"a" * 10**6 + b") Tj ET"), "/Filter/FlateDecode", font, HELVETICA
        ),
        "warnings-50000.pdf": drawing(zlib.compress(b"".join(b"/N%d Do\n" % n for n in range(50_000))), "/Filter/FlateDecode"),
        "content-inflates-to-20-mib.pdf": drawing(deflated(pressed(b" " * 2**20) * 20), "/Filter/FlateDecode"),
        "content-inflates-to-60-gib.pdf": drawing(
            deflated(pressed(b"\x78\x9c"), pressed(gigabyte) * 60), "/Filter[/FlateDecode/FlateDecode]"
        ),
        "object-stream-inflates-to-60-gib.pdf": b"%PDF-1.7\n1 0 obj"
        + make_stream(
            deflated(pressed(b"\x78\x9c"), pressed(gigabyte) * 60),
            "/Type/ObjStm/N 1000000000/First 999999999/Filter[/FlateDecode/FlateDecode]",
        )
        + b"endobj\n",
        "shapes-10-million.pdf": drawing(deflated(pressed(b"0 0 m 9 9 l 9 0 l f\n" * 50_000) * 200), "/Filter/FlateDecode"),
    }


def scan(entries: str, data: bytes, width: int = 100, height: int = 100, colours: str = "/DeviceGray", *objects: str) -> bytes:
    """Return a PDF of one page that shows one image, and more objects from number 6 on."""
    shape = f"/Type/XObject/Subtype/Image/Width {width}/Height {height}/BitsPerComponent 8/ColorSpace{colours}"
    return drawing(b"200 0 0 100 0 0 cm /X Do", "", "/XObject<</X 5 0 R>>", make_stream(data, shape + entries), *objects)


def pdf_images() -> dict[str, bytes]:
    """Images in PDFs: damaged, and larger than memory."""
    jpx = encode_image(Image.effect_noise((64, 64), 90), "JPEG2000", no_jp2=True, num_resolutions=1)
    size = jpx.index(b"\xff\x51") + 6
    vast = jpx[:size] + struct.pack(">8I", 10**5, 10**5, 0, 0, 10**5, 10**5, 0, 0) + jpx[size + 32 :]
    sheet = struct.pack(">IBBBIIIIIBH", 0, 0x30, 0, 1, 19, 65535, 65535, 0, 0, 0, 0)
    wide = "/DecodeParms<</Predictor 15/Columns 2000000000/Colors 4/BitsPerComponent 8>>"
    return {
        "jbig2-damaged.pdf": scan("/Filter/JBIG2Decode", rng_bytes(500)),
        "jbig2-of-4-gigapixels.pdf": scan("/Filter/JBIG2Decode", sheet, 65535, 65535),
        "jpx-damaged.pdf": scan("/Filter/JPXDecode", jpx[:200] + rng_bytes(500)),
        "jpx-of-10-gigapixels.pdf": scan("/Filter/JPXDecode", vast, 10**5, 10**5),
        "jpeg-damaged.pdf": scan("/Filter/DCTDecode", encode_image(Image.effect_noise((100, 100), 90), "JPEG")[:2000]),
        "fax-damaged.pdf": scan("/Filter/CCITTFaxDecode", rng_bytes(500)),
        "flate-damaged.pdf": scan("/Filter/FlateDecode", rng_bytes(500)),
        "filter-unknown.pdf": scan("/Filter/NoSuchDecode", rng_bytes(500)),
        "filters-300.pdf": scan("/Filter[" + "/ASCIIHexDecode" * 300 + "]", b"00>"),
        "predictor-of-8-gb.pdf": scan("/Filter/FlateDecode" + wide, zlib.compress(bytes(1000))),
        "image-of-nothing.pdf": scan("", b"", 0, 0),
        "image-short-of-data.pdf": scan("", b"\x80" * 500),
        "image-of-30-gb.pdf": scan("/Filter/FlateDecode", zlib.compress(bytes(10**6)), 10**5, 10**5, "/DeviceRGB"),
        "image-masked-by-itself.pdf": scan("/SMask 5 0 R", bytes(10**4)),
        "colours-of-themselves.pdf": scan("", bytes(10**4), 100, 100, " 6 0 R", "[/Indexed 6 0 R 255 (abc)]"),
        "tint-of-itself.pdf": scan(
            "",
            bytes(10**4),
            100,
            100,
            "[/Separation/A/DeviceGray 6 0 R]",
            "<</FunctionType 3/Functions[6 0 R]/Bounds[]/Encode[0 1]/Domain[0 1]>>",
        ),
        "visible-if-itself.pdf": scan("/OC<</Type/OCMD/VE 6 0 R>>", bytes(10**4), 100, 100, "/DeviceGray", "[/And 6 0 R]"),
    }


def catalogued(entries: str, *trailing: str) -> bytes:
    """Return a PDF of one page with these entries in its catalogue, and in its trailer."""
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R>>"
    made = make_pdf(f"<</Type/Catalog/Pages 2 0 R{entries}>>", "<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, SQUARE)
    return made.replace(b"trailer<<", ("trailer<<" + "".join(trailing)).encode())


def pdf_intentions() -> dict[str, bytes]:
    """Scripts, embedded files, references to other files, passwords."""
    field = f"<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(1)/Rect[9 9 90 60]/F 4/AA<</C {SPEECH}/F {SPEECH}/K {SPEECH}>>>>"
    leaf = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Annots[4 0 R]/AA<</O {SPEECH}>>>>"
    names = f"/Names<</JavaScript<</Names[(a) {SPEECH}]>>>>/AcroForm<</Fields[4 0 R]/CO[4 0 R]/NeedAppearances true>>"
    stamp = "<</Type/Annot/Subtype/Stamp/Rect[0 0 200 100]/AP<</N 5 0 R>>>>"
    stamped = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Annots[4 0 R 3 0 R 1 0 R]>>"
    attached = pymupdf.open(stream=make_page_pdf(content=b"0 0 50 50 re f"))
    attached.embfile_add("bomb.pdf", make_endless_pdf())
    return {
        "script-without-end.pdf": make_pdf(
            f"<</Type/Catalog/Pages 2 0 R/OpenAction {SPEECH}{names}>>", "<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, field
        ),
        "stamp-of-itself.pdf": tree(
            "<</Type/Pages/Kids[3 0 R]/Count 1>>", stamped, stamp, form(b"0 0 9 9 re f /X Do", "/XObject<</X 5 0 R>>")
        ),
        "launches-a-shell.pdf": catalogued("/OpenAction<</S/Launch/F(/bin/sh)/Win<</F(cmd.exe)/P(/c calc)>>>>"),
        "opens-a-url.pdf": catalogued("/OpenAction<</S/URI/URI(http://127.0.0.1:9/x)>>"),
        "embeds-a-file.pdf": bytes(attached.tobytes()),
        "content-elsewhere.pdf": drawn(b"<</Length 0/F(/etc/hostname)>>stream\n\nendstream"),
        "encrypted-known-password.pdf": encrypted(PASSWORD),
        "encrypted-unknown-password.pdf": encrypted("another"),
        "encrypted-empty-password.pdf": encrypted(""),
        "encrypted-by-certificate.pdf": catalogued("", "/ID[(a)(a)]/Encrypt<</Filter/Adobe.PubSec/V 4/Length 128>>"),
        "encrypted-by-nonsense.pdf": catalogued("", "/ID[(a)(a)]/Encrypt<</Filter/Standard/V 99/R 99/O(a)/U(a)/P 0>>"),
    }


def encrypted(password: str) -> bytes:
    document = pymupdf.open(stream=make_page_pdf(content=b"0 0 50 50 re f"))
    return bytes(document.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw=password, owner_pw="the owner's"))


# ---- Images -------------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colours: int, data: bytes, *between: bytes) -> bytes:
    """Return a PNG of these compressed rows, whatever they are."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(*frames: tuple[int, int], circle: bool = False) -> bytes:
    """Return a TIFF of white frames of these sizes, all made of one strip of 8 bytes; the last may lead back to the first."""
    body, place = b"II*\0" + struct.pack("<I", 16) + bytes([255] * 8), 16
    for number, (width, height) in enumerate(frames, 1):
        tags = (
            (256, 4, width),
            (257, 4, height),
            (258, 3, 8),
            (259, 3, 1),
            (262, 3, 1),
            (273, 4, 8),
            (277, 3, 1),
            (278, 4, height),
            (279, 4, 8),
        )
        entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
        place += 2 + len(entries) + 4
        following = place if number < len(frames) else 16 if circle else 0
        body += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return body


def webp(width: int, height: int) -> bytes:
    """Return the beginning of a WebP with a canvas of this size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    still = encode_image(Image.new("RGB", (8, 8)), "WEBP")[12:]
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + still
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def images() -> dict[str, bytes]:
    """Images of every mode and kind, and damaged ones."""
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    frames = [Image.new("RGB", (60, 40), colour) for colour in ("black", "white", "red")]
    kinds: dict[str, dict[str, Any]] = {"JPEG": {}, "PNG": {}, "TIFF": {"compression": "tiff_lzw"}, "GIF": {}, "WEBP": {}, "BMP": {}}
    whole = {kind: encode_image(noise, kind, **options) for kind, options in kinds.items()}
    pages = encode_image(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    palette = noise.quantize(16)
    return {
        **{f"whole.{kind.lower()}": data for kind, data in whole.items()},
        **{f"truncated.{kind.lower()}": data[: len(data) // 2] for kind, data in whole.items()},
        **{f"garbage-behind-magic.{kind.lower()}": data[:30] + rng_bytes(2000) for kind, data in whole.items()},
        "cmyk.jpeg": encode_image(noise.convert("CMYK"), "JPEG"),
        "cmyk.tiff": encode_image(noise.convert("CMYK"), "TIFF"),
        "16-bit.png": encode_image(Image.fromarray(np.arange(60_000, dtype=np.uint16).reshape(200, 300)), "PNG"),
        "16-bit.tiff": encode_image(Image.fromarray(np.arange(60_000, dtype=np.uint16).reshape(200, 300)), "TIFF"),
        "palette.png": encode_image(palette, "PNG"),
        "palette-with-holes.gif": encode_image(palette, "GIF", transparency=3),
        "alpha.png": encode_image(noise.convert("RGBA"), "PNG"),
        "grey-with-alpha.png": encode_image(noise.convert("LA"), "PNG"),
        "one-bit.tiff": encode_image(noise.convert("1"), "TIFF", compression="group4"),
        "lab.tiff": encode_image(Image.new("LAB", (30, 20)), "TIFF"),
        "animated.gif": encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encode_image(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": encode_image(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "several.mpo.jpeg": encode_image(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "pages-3.tiff": pages,
        "pages-in-a-circle.tiff": tiff((4, 2), (2, 4), circle=True),
        "pages-3000.tiff": tiff(*[(4, 2)] * 3000),
        "second-page-nowhere.tiff": tiff((4, 2))[:-4] + struct.pack("<I", 10**6),
        "strip-nowhere.tiff": tiff((4, 2)).replace(struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 1, 10**8)),
        "tags-a-billion.tiff": tiff((4, 2)).replace(struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 10**9, 8)),
        "of-nothing.png": png(0, 0, 8, 0, zlib.compress(b"")),
        "no-rows.png": png(100, 100, 8, 0, zlib.compress(b"")),
        "one-row-wide.png": png(10**6, 1, 8, 0, zlib.compress(bytes(10**6 + 1))),
        "wrong-checksums.png": whole["PNG"][:-16] + bytes(4) + whole["PNG"][-12:],
        "exif-in-a-circle.jpeg": encode_image(
            noise, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 8)
        ),
        "100-megapixels.jpeg": encode_image(Image.new("L", (10_000, 10_000), 200), "JPEG"),
        "100-megapixels.png": png(10_000, 10_000, 1, 0, zlib.compress((b"\0" + b"\xff" * 1250) * 10_000, 6)),
    }


def bombs() -> dict[str, bytes]:
    """Images that declare, or hold, far more than fits."""
    text = chunk(b"zTXt", b"a\0\0" + deflated(pressed(bytes(2**20)) * 100))
    return {
        "40-gigapixels.png": png(200_000, 200_000, 8, 2, zlib.compress(bytes(10**5))),
        "4-gigapixels.tiff": tiff((65_535, 65_535)),
        "4-gigapixels.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(4) + b"\1\0\1\0\0\2\2D\1\0;",
        "4-gigapixels.jpeg": encode_image(Image.new("L", (8, 8)), "JPEG").replace(b"\0\x08\0\x08", b"\xff\xdc\xff\xdc"),
        "4-gigapixels.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 65_535, 65_535, 1, 24, 0, 0, 0, 0, 0, 0),
        "268-megapixels.webp": webp(16_384, 16_384),
        "text-of-100-mib.png": png(8, 8, 8, 0, zlib.compress(bytes(72)), text),
    }


# ---- Other things -------------------------------------------------------------------------------------------------


def zipped(*names: str, content: bytes = b"<x/>", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return file.getvalue()


def strangers() -> dict[str, bytes]:
    """Files of kinds that are not promised, under any name, most of which MuPDF could open."""
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
    html = b'<!DOCTYPE html><html><body><p>Dear customer</p><img src="file:///etc/passwd"><iframe src="http://127.0.0.1:9/"></iframe>'
    return {
        "empty.pdf": b"",
        "empty.png": b"",
        "text.pdf": b"Dear customer, please find attached your invoice.\n",
        "zeros.pdf": bytes(10_000),
        "random.pdf": rng_bytes(10_000),
        "zip.pdf": zipped("a.txt"),
        "zip-of-a-pdf.pdf": zipped("a.pdf", content=make_page_pdf(), method=zipfile.ZIP_STORED),
        "gzip-of-a-pdf.pdf": gzip.compress(make_page_pdf(), mtime=0),
        "svg.pdf": svg,
        "drawing.svg": b'<?xml version="1.0"?>\n' + svg,
        "page.html": html,
        "book.epub": zipped("mimetype", "META-INF/container.xml", content=b"application/epub+zip"),
        "letter.docx": zipped("[Content_Types].xml", "word/document.xml"),
        "paper.xps": zipped("[Content_Types].xml", "FixedDocSeq.fdseq"),
        "book.fb2": b'<?xml version="1.0"?><FictionBook><body><p>x</p></body></FictionBook>',
        "picture.psd": b"8BPS\0\1" + rng_bytes(100),
        "picture.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + rng_bytes(100),
        "picture.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "picture.ppm": b"P6 9 9 255\n" + bytes(243),
        "a name with spaces.pdf": make_page_pdf(),
        "a\nname\non\nlines.pdf": make_page_pdf(),
        "ünïcödé 📄☃.pdf": make_page_pdf(),
        "caf\udce9.pdf": make_page_pdf(),
        "twin of these bytes.pdf": make_page_pdf(),
    }
