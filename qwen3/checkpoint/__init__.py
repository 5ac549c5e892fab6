"""Folders in Hugging Face format: reading them in pieces, writing them, eight-bit weights."""
