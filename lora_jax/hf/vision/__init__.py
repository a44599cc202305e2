"""Images for language models: their patches or tiles, and the tokens that stand for them."""
