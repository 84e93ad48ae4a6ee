"""From text to token files: corpus, tokenizer, preparation."""
