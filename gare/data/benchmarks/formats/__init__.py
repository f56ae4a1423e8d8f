"""Readers of annotation files: from JSON, CSV, text and archives to rows of captions."""
