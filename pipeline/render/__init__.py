"""Rendering: the bytes of a PDF or an image come in, and pages of pixels and words go out, drawn in a confined child process.
This file imports nothing, because the parent process must not load MuPDF or Pillow.
"""
