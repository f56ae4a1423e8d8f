"""Fetching videos from other machines: S3 and what speaks its protocol, and web servers."""
