"""Import of published weights: OpenAI's CLIP, Hugging Face folders, the released code."""
