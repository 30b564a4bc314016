"""Exchange with Hugging Face folders and GGUF files: one key table, streamed files, no torch."""
