"""Images for language models: what their processors make of them, and the tokens they become."""
