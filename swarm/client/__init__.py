"""A model whose middle is elsewhere: routing, sessions, histories and the Hugging Face face."""
