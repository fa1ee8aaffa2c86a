"""Document renderer: pages have the size that the model reads, and are not squashed, cut or resampled twice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pymupdf
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.budget import ImageSize, PixelBudget, RenderSettings, count_visual_tokens, fit_page, smart_resize
from pipeline.errors import DocumentError
from pipeline.records import Page, Pixels, WordMark
from pipeline.render.document import detect_kind, open_document, render_pages
from pipeline.render.errors import MAX_WARNINGS
from pipeline.render.images import DocumentKind, encode_page_png
from pipeline.render.pdf import WarningCollector
from tests.support.pdfs import draw_corners, encode_image, make_page_pdf, make_pages_pdf, make_pdf, make_stream, make_tree_pdf

CORPORA = Path(__file__).parents[4] / "shared/corpora"
SETTINGS = RenderSettings(text_layer=True)
BUDGET = SETTINGS.budget


def render_first(data: bytes, settings: RenderSettings = SETTINGS) -> Page:
    return next(render_pages(data, settings))


def size_of(pixels: Pixels) -> ImageSize:
    return ImageSize(pixels.shape[1], pixels.shape[0])


def render_failure(data: bytes, settings: RenderSettings = SETTINGS) -> DocumentError:
    with pytest.raises(DocumentError) as caught:
        list(render_pages(data, settings))
    return caught.value


def find_dark(pixels: Pixels) -> NDArray[np.bool_]:
    return pixels.max(axis=2) < 100


def measure_extent(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the width and height of the marked area."""
    return int(np.ptp(np.flatnonzero(mask.any(axis=0)))) + 1, int(np.ptp(np.flatnonzero(mask.any(axis=1)))) + 1


def make_encrypted_pdf(password: str) -> bytes:
    document = pymupdf.open(stream=make_page_pdf())
    return document.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw=password, owner_pw="other")


# ---- The model's processor changes nothing ------------------------------------------------------------------------

SHAPES = [(595, 842), (842, 595), (720, 36), (20, 20), (2384, 3370), (14_400, 14)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_smart_resize_leaves_a_page_as_it_is(width: float, height: float) -> None:
    page = render_first(make_page_pdf(width, height))
    assert smart_resize(*page.pixels.shape[:2], BUDGET.min_pixels, BUDGET.max_pixels) == page.pixels.shape[:2]
    assert page.visual_tokens == count_visual_tokens(size_of(page.pixels))


# ---- Nothing squashed, nothing cut --------------------------------------------------------------------------------

PAGES = {
    "plain": (595, 842, ""),
    "rotated": (595, 842, "/Rotate 90"),
    "strip 20:1": (1440, 72, ""),
    "strip 60:1": (3600, 60, ""),
    "column 1:300": (20, 6000, ""),
    "stamp": (10, 10, ""),
    "A0": (2384, 3370, ""),
    "huge": (200_000, 100_000, ""),
}


@pytest.mark.parametrize(("width", "height", "extra"), PAGES.values(), ids=PAGES)
def test_a_page_has_the_size_that_its_budget_says_and_keeps_its_corners(width: float, height: float, extra: str) -> None:
    page = render_first(make_page_pdf(width, height, draw_corners(width, height, min(width, height) / 3), extra))
    assert size_of(page.pixels) == fit_page(page.width_pt, page.height_pt, SETTINGS.dpi, BUDGET)
    across, down = measure_extent(find_dark(page.pixels))
    assert across / down == pytest.approx(page.width_pt / page.height_pt, rel=0.06)


@pytest.mark.parametrize(("width", "height", "extra"), PAGES.values(), ids=PAGES)
def test_squares_stay_squares(width: float, height: float, extra: str) -> None:
    side = min(width, height) / 2
    page = render_first(make_page_pdf(width, height, f"{width / 2 - side / 2} {height / 2 - side / 2} {side} {side} re f".encode(), extra))
    across, down = measure_extent(find_dark(page.pixels))
    assert across / down == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize(("width", "height"), [(1000, 50), (10, 10), (1, 1), (3000, 10), (2500, 2000)])
def test_images_keep_their_proportions(width: int, height: int) -> None:
    page = render_first(encode_image(Image.new("RGB", (width, height)), "PNG"))
    across, down = measure_extent(find_dark(page.pixels))
    assert across / down == pytest.approx(width / height, rel=0.06)


def test_a_crop_box_cuts_where_it_says() -> None:
    page = render_first(make_page_pdf(600, 600, b"1 0 0 rg 0 0 600 600 re f 0 0 1 rg 100 200 200 300 re f", "/CropBox[100 200 300 500]"))
    assert (page.width_pt, page.height_pt) == (200, 300)
    assert np.all(page.pixels == (0, 0, 255))


def test_nothing_outside_the_crop_box_shows_beside_a_padded_page() -> None:
    page = render_first(make_page_pdf(3600, 3600, b"1 0 0 rg 0 0 3600 3600 re f 0 0 1 rg 0 0 3600 60 re f", "/CropBox[0 0 3600 60]"))
    assert set(map(tuple, page.pixels[::4, ::4].reshape(-1, 3))) == {(0, 0, 255), (255, 255, 255)}


def test_a_fixed_size_letterboxes_pages_of_another_shape() -> None:
    settings = RenderSettings(PixelBudget(resized_height=560, resized_width=560))
    page = render_first(make_page_pdf(400, 100, b"0 0 400 100 re f"), settings)
    assert page.pixels.shape == (560, 560, 3)
    assert measure_extent(find_dark(page.pixels)) == (560, 140)


def test_a_page_is_what_mupdf_draws_at_that_size() -> None:
    data = make_page_pdf(595, 842, draw_corners(595, 842, 50) + b" BT /F 30 Tf 100 400 Td (Invoice 123) Tj ET")
    page, (theirs, *_) = render_first(data), pymupdf.open(stream=data)
    scale = pymupdf.Matrix(page.pixels.shape[1] / 595, page.pixels.shape[0] / 842)
    assert theirs.get_pixmap(matrix=scale).samples == page.pixels.tobytes()


# ---- A page's fields ----------------------------------------------------------------------------------------------


def test_a_page_knows_its_dpi() -> None:
    assert render_first(make_page_pdf(595, 842)).dpi == pytest.approx(72 * (840 * 1176 / (595 * 842)) ** 0.5)


@pytest.mark.parametrize("extra", ["", "/Rotate 90", "/Rotate 270", "/CropBox[50 20 390 280]"])
def test_words_stand_where_their_ink_is(extra: str) -> None:
    page = render_first(make_page_pdf(400, 300, b"BT /F 24 Tf 100 100 Td (Total) Tj ET", extra))
    (word,) = page.words
    scale = page.dpi / 72
    rows, columns = np.nonzero(find_dark(page.pixels))
    assert word.text == "Total"
    assert word.x0_pt - 2 <= columns.min() / scale <= columns.max() / scale <= word.x1_pt + 2
    assert word.y0_pt - 2 <= rows.min() / scale <= rows.max() / scale <= word.y1_pt + 2


def test_words_outside_the_crop_box_are_marked() -> None:
    page = render_first(make_page_pdf(400, 300, b"BT /F 12 Tf 10 10 Td (gone) Tj 0 200 Td (here) Tj ET", "/CropBox[0 100 400 300]"))
    assert [(word.text, word.mark) for word in page.words] == [("gone", WordMark.OFF_PAGE), ("here", WordMark.PRINTED)]


def test_mupdfs_warnings_are_collected_and_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    page = render_first(make_page_pdf(content=b"q q q /Nope Do (").replace(b"startxref", b"startxxxx"))
    assert any("repair" in warning for warning in page.warnings)
    assert capfd.readouterr() == ("", "")


def test_what_mupdf_says_is_bounded_and_a_lack_of_memory_is_never_missed() -> None:
    collector = WarningCollector()
    for number in range(1000):
        collector.record(f"{number} " + "x" * 1000)
    collector.record("malloc of 8 bytes failed")
    collector.record("realloc of 9 bytes failed")
    lines, lacking = collector.take()
    assert (len(lines), max(map(len, lines)), lacking) == (MAX_WARNINGS, 300, "malloc of 8 bytes failed")
    assert collector.take() == ((), "")


def test_the_text_layer_is_bounded() -> None:
    page = render_first(
        make_page_pdf(content=b"BT /F .01 Tf " + b"1 0 0 1 9 9 Tm (%b) Tj 1 0 0 1 9 20 Tm (b) Tj " % (b"a" * 5000) * 60 + b"ET")
    )
    assert sum(len(word.text) for word in page.words) <= 200_000
    assert page.warnings == (f"of the text layer only the first {len(page.words)} words are kept",)


def test_form_fields_are_drawn_and_read() -> None:
    field = "<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(HELLO)/Rect[10 10 190 60]/DA(/Helv 24 Tf 0 g)/F 4>>"
    font = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    root = "<</Type/Catalog/Pages 2 0 R/AcroForm<</NeedAppearances true/Fields[4 0 R]/DR<</Font<</Helv 5 0 R>>>>>>>>"
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Annots[4 0 R]>>"
    page = render_first(make_pdf(root, "<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, field, font))
    assert [word.text for word in page.words] == ["HELLO"]
    assert find_dark(page.pixels).any()


def test_pages_keep_their_numbers() -> None:
    assert [page.page_no for page in render_pages(make_pages_pdf(5), SETTINGS, 2, 9)] == [2, 3, 4, 5]


def test_a_page_that_is_missing_keeps_its_number() -> None:
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 %s 100]>>"
    opened = open_document(make_tree_pdf("3 0 R 9 0 R 4 0 R", "/Count 2", leaf % 300, leaf % 400), SETTINGS)
    assert (opened.page_count, opened.draw(1).width_pt, opened.draw(3).width_pt) == (3, 300, 400)
    with pytest.raises(DocumentError, match="page 2 cannot be found"):
        opened.draw(2)


@pytest.mark.parametrize("count", ["", "/Count 0", "/Count 1", "/Count -7", "/Count 1000000000", "/Count/Many", "/Count 2"])
def test_pages_are_counted_and_the_count_is_not_believed(count: str) -> None:
    inherited = f"{count}/MediaBox[0 0 300 100]/Rotate 90"
    pages = list(
        render_pages(
            make_tree_pdf("3 0 R 4 0 R", inherited, "<</Type/Page/Parent 2 0 R>>", "<</Parent 2 0 R/MediaBox[0 0 10 20]>>"), SETTINGS
        )
    )
    assert [(page.page_no, page.width_pt, page.height_pt) for page in pages] == [(1, 100, 300), (2, 20, 10)]


def test_a_page_tree_in_a_circle_ends() -> None:
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 100]>>"
    assert [page.width_pt for page in render_pages(make_tree_pdf("2 0 R 3 0 R 2 0 R", "/Count 3", leaf), SETTINGS)] == [300]


def test_a_page_that_is_named_twice_is_two_pages() -> None:
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 100]>>"
    assert [page.page_no for page in render_pages(make_tree_pdf("3 0 R 3 0 R", "/Count 2", leaf), SETTINGS)] == [1, 2]


# ---- Kinds --------------------------------------------------------------------------------------------------------

PICTURE = Image.new("RGB", (560, 560), (200, 30, 30))
IMAGE_KINDS = [kind for kind in DocumentKind if kind not in (DocumentKind.PDF, DocumentKind.HEIF)]
"""All that need no package of an extra; HEIF is in `test_images.py`."""


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_every_kind_of_image_is_a_page(kind: DocumentKind) -> None:
    opened = open_document(encode_image(PICTURE, kind), SETTINGS)
    assert (opened.kind, opened.page_count) == (kind, 1)
    assert np.abs(opened.draw(1).pixels.astype(int) - (200, 30, 30)).max() <= 6


@pytest.mark.parametrize("junk", [b"", b"\r\n", b"x" * 1500, b"%!PS-Adobe-3.0\n"])
def test_a_pdf_is_known_by_its_marker_wherever_it_stands(junk: bytes) -> None:
    assert detect_kind(junk + make_page_pdf()) is DocumentKind.PDF


def test_a_pdf_without_a_header_is_read() -> None:
    assert render_first(make_page_pdf().removeprefix(b"%PDF-1.7\n")).page_no == 1


PACKED = [b"PK\3\4" + make_page_pdf(), b"\x1f\x8b\x08" + make_page_pdf()]


@pytest.mark.parametrize("data", [b"dear customer", b"BMW sells cars, and more of them than ever", b"<svg></svg>", *PACKED])
def test_other_content_is_unrecognised(data: bytes) -> None:
    assert render_failure(data).kind == "unrecognised"


def test_the_pages_of_a_tiff_are_pages() -> None:
    sheets = [Image.new("RGB", (560, 560), (level, 0, 0)) for level in (10, 120, 240)]
    data = encode_image(sheets[0], "TIFF", save_all=True, append_images=sheets[1:], compression="tiff_lzw")
    assert [(page.page_no, page.pixels[0, 0, 0]) for page in render_pages(data, SETTINGS)] == [(1, 10), (2, 120), (3, 240)]


@pytest.mark.parametrize("kind", [DocumentKind.GIF, DocumentKind.WEBP, DocumentKind.PNG])
def test_of_an_animation_the_first_frame_is_read(kind: DocumentKind) -> None:
    frames = [Image.new("RGB", (560, 560), colour) for colour in ("black", "white")]
    (page,) = render_pages(encode_image(frames[0], kind, save_all=True, append_images=frames[1:]), SETTINGS)
    assert page.pixels.max() < 5
    assert page.warnings == ("an animation: only its first frame is read",)


def test_of_several_photographs_in_one_file_the_first_is_decoded_small() -> None:
    frames = [Image.new("L", (4000, 4000), level) for level in (60, 200)]
    opened = open_document(encode_image(frames[0], "MPO", save_all=True, append_images=frames[1:]), SETTINGS)
    drafted: list[tuple[int, int]] = []
    draft = JpegImageFile.draft

    def recorded(self: JpegImageFile, *arguments: Any) -> Any:
        made = draft(self, *arguments)
        drafted.append(self.size)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JpegImageFile, "draft", recorded)
        assert np.all(opened.draw(1).pixels == 60)
    assert drafted == [(2000, 2000)]


def test_a_tiff_is_counted_no_further_than_allowed() -> None:
    sheets = [Image.new("L", (8, 8))] * 9
    data = encode_image(sheets[0], "TIFF", save_all=True, append_images=sheets[1:])
    error = render_failure(data, RenderSettings(max_pages=5))
    assert (error.kind, error.message) == ("too_many_pages", "the document has 6 pages or more; `limits.max_pages` is 5")


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("animated", [False, True])
def test_a_webp_is_measured_before_it_is_opened(lossless: bool, animated: bool) -> None:
    extra = {"save_all": True, "append_images": [Image.new("RGB", (50, 40))]} if animated else {}
    data = encode_image(Image.new("RGB", (50, 40), "white"), "WEBP", lossless=lossless, **extra)
    assert "50x40" in render_failure(data, RenderSettings(max_image_pixels=1999)).message
    assert render_first(data, RenderSettings(max_image_pixels=2000)).page_no == 1


# ---- Colours ------------------------------------------------------------------------------------------------------

RAMP = np.tile(np.linspace(0, 1, 560), (560, 1))
GREYS = {
    "16 bit": (RAMP * 65535).astype(np.uint16),
    "12 bit in 16": (RAMP * 4095).astype(np.uint16),
    "32 bit": (RAMP * 1e9).astype(np.int32),
    "signed": (RAMP * 2000 - 1000).astype(np.int32),
    "float": RAMP.astype(np.float32),
    "float with holes": np.where(RAMP < 0.5, RAMP, np.nan).astype(np.float32) * 1000,
}


@pytest.mark.parametrize("values", GREYS.values(), ids=GREYS)
def test_deep_greys_are_scaled_not_clipped(values: NDArray[np.generic]) -> None:
    greys = render_first(encode_image(Image.fromarray(values), "TIFF")).pixels[0, :, 0].astype(int)
    assert np.all(np.diff(greys[:250]) >= 0)
    assert greys[0] < 5
    assert 50 < greys[140] < 140
    assert greys[-1] > 250


def test_a_16_bit_png_is_scaled() -> None:
    page = render_first(encode_image(Image.fromarray(np.full((560, 560), 32768, np.uint16)), "PNG"))
    assert np.all(page.pixels == 128)


def test_white_is_zero_in_a_fax_of_16_bits() -> None:
    ink = Image.fromarray(np.where(RAMP > 0.5, 65535, 0).astype(np.uint16))
    page = render_first(encode_image(ink, "TIFF", tiffinfo={262: 0}))
    assert page.pixels[0, 0, 0] == 255
    assert page.pixels[0, -1, 0] == 0


def test_transparency_stands_on_white() -> None:
    half = Image.new("RGBA", (560, 560), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 280, 560))
    page = render_first(encode_image(half, "PNG"))
    assert tuple(page.pixels[5, 5]) == (255, 0, 0)
    assert tuple(page.pixels[5, -5]) == (255, 255, 255)


@pytest.mark.parametrize("transparent", [b"\xff\x00", 1])
def test_palettes_keep_their_colours_and_their_holes(transparent: bytes | int) -> None:
    picture = Image.new("P", (560, 560))
    picture.putpalette([0, 0, 200, 0, 200, 0])
    picture.paste(1, (280, 0, 560, 560))
    page = render_first(encode_image(picture, "PNG", transparency=transparent))
    assert tuple(page.pixels[5, 5]) == (0, 0, 200)
    assert tuple(page.pixels[5, -5]) == (255, 255, 255)


@pytest.mark.parametrize("kind", [DocumentKind.JPEG, DocumentKind.TIFF])
def test_cmyk_becomes_rgb(kind: DocumentKind) -> None:
    page = render_first(encode_image(Image.new("CMYK", (560, 560), (0, 255, 255, 0)), kind))
    assert np.abs(page.pixels.astype(int) - (255, 0, 0)).max() < 5


def test_lab_shows_its_lightness() -> None:
    page = render_first(encode_image(Image.new("LAB", (560, 560), (128, 128, 128)), "TIFF"))
    assert np.all(page.pixels == 128)


# ---- Images on paper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DocumentKind.JPEG, DocumentKind.PNG, DocumentKind.WEBP, DocumentKind.TIFF])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_set_upright(orientation: int, kind: DocumentKind) -> None:
    upright = Image.new("RGB", (840, 560), "white")
    ImageDraw.Draw(upright).rectangle((0, 0, 200, 100), fill="black")
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    page = render_first(encode_image(stored, kind, exif=exif, **({} if kind is DocumentKind.TIFF else {"dpi": (300, 300)})))
    assert page.pixels.shape == (560, 840, 3)
    assert find_dark(page.pixels)[5:95, 5:195].all()
    assert not find_dark(page.pixels)[110:].any()


def test_real_photographs_of_all_orientations_look_alike() -> None:
    files = sorted((CORPORA / "odd/exif-orientation").glob("Landscape_[1-8].jpg"))
    if not files:
        pytest.skip("the shared corpora are not here")
    pages = [render_first(file.read_bytes()).pixels.mean(axis=2) for file in files]
    assert len(pages) == 8
    assert max(np.abs(page - pages[0]).mean() for page in pages) < 4  # compressed anew in each orientation; 39 to 81 when it is ignored


@pytest.mark.parametrize(("stated", "width_pt"), [((300, 300), 240), (None, 360), ((1, 1), 360), ((0, 0), 360)])
def test_an_image_measures_what_its_dpi_say(stated: tuple[int, int] | None, width_pt: float) -> None:
    page = render_first(encode_image(Image.new("L", (1000, 1000)), "TIFF", **({"dpi": stated} if stated else {})))
    assert page.width_pt == pytest.approx(width_pt)
    assert page.dpi == pytest.approx(72 * page.pixels.shape[1] / width_pt)


def test_a_fax_of_half_as_many_rows_is_not_squashed() -> None:
    page = render_first(encode_image(Image.new("1", (1728, 1100)), "TIFF", dpi=(204, 98)))
    across, down = measure_extent(find_dark(page.pixels))
    assert across / down == pytest.approx((1728 / 204) / (1100 / 98), rel=0.03)


def test_large_images_are_averaged_not_sampled() -> None:
    stripes = np.zeros((2000, 2800), np.uint8)
    stripes[:, ::2] = 255
    page = render_first(encode_image(Image.fromarray(stripes), "PNG"), RenderSettings(PixelBudget(784, 78_400)))
    assert np.abs(page.pixels.astype(int) - 127).max() <= 3


# ---- Failures -----------------------------------------------------------------------------------------------------


def test_an_encrypted_pdf_opens_with_its_password() -> None:
    assert render_first(make_encrypted_pdf("abc"), RenderSettings(password="abc")).page_no == 1


@pytest.mark.parametrize(("password", "reason"), [(None, "wants a password"), ("nope", "does not open it")])
def test_without_its_password_it_says_what_to_do(password: str | None, reason: str) -> None:
    error = render_failure(make_encrypted_pdf("abc"), RenderSettings(password=password))
    assert error.kind == "encrypted"
    assert reason in error.message
    assert "source.password_env" in error.message


def test_an_empty_password_is_tried_by_itself() -> None:
    assert render_first(make_encrypted_pdf("")).page_no == 1


BROKEN = {
    "empty": b"",
    "no_pages": make_pdf("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[]/Count 0>>"),
    "broken": b"%PDF-1.7 and nothing else",
    "too_many_pages": make_pages_pdf(11),
    "too_large": encode_image(Image.new("1", (4000, 4000)), "PNG"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_has_a_kind(kind: str) -> None:
    assert render_failure(BROKEN[kind], RenderSettings(max_pages=10, max_image_pixels=10_000_000)).kind == kind


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_cut_off_image_is_broken(kind: DocumentKind) -> None:
    noise = Image.effect_noise((300, 300), 90).convert("RGB")
    data = encode_image(noise, kind)
    assert render_failure(data[: len(data) // 2]).kind == "broken"


def test_messages_do_not_change_from_run_to_run() -> None:
    data = encode_image(PICTURE, "PNG")[:20]
    assert render_failure(data).message == render_failure(data).message
    assert "0x" not in render_failure(data).message


def test_a_file_larger_than_allowed_is_not_opened() -> None:
    assert render_failure(make_page_pdf(), RenderSettings(max_file_bytes=100)).kind == "too_large"


BOXES = ["0 0 0 0", "0 0 1e400 nan", "-1e38 -1e38 1e38 1e38", "200 100 0 0", "0 0 0.001 0.001", "0 0 10000000 10000000"]


@pytest.mark.parametrize("box", BOXES)
def test_senseless_media_boxes_are_still_a_page(box: str) -> None:
    page = render_first(make_page_pdf().replace(b"[0 0 200 100]", f"[{box}]".encode()))
    assert BUDGET.min_pixels <= page.pixels.shape[0] * page.pixels.shape[1] <= BUDGET.max_pixels


def test_a_form_that_draws_itself_ends() -> None:
    form = make_stream(b"0 0 9 9 re f /X Do", "/Type/XObject/Subtype/Form/BBox[0 0 200 100]/Resources<</XObject<</X 6 0 R>>>>")
    leaf = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents 4 0 R/Resources<</XObject<</X 6 0 R>>>>>>"
    data = make_pdf("<</Type/Catalog/Pages 2 0 R>>", "<</Type/Pages/Kids[3 0 R]/Count 1>>", leaf, make_stream(b"/X Do"), "null", form)
    assert find_dark(render_first(data).pixels).any()


def test_a_png_of_a_page_is_that_page() -> None:
    page = render_first(make_page_pdf(content=b"1 0 0 rg 10 10 50 50 re f"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_page_png(page.pixels)))), page.pixels)
