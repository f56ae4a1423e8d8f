"""Forms of annotation files: JSON, CSV, text and archives, to rows of captions."""
