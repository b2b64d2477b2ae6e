"""The HTTP API that OpenAI's clients speak, and the chat page."""
