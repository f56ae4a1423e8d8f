"""Weights of others: OpenAI's CLIP, Hugging Face folders, the released code."""
