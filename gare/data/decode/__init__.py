"""Videos to frames: what a file holds, which of its pictures a clip takes, and who decodes them."""
