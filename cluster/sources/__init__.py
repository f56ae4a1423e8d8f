"""Fetching of videos from other machines: S3-compatible stores and web servers."""
