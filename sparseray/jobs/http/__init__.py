"""The HTTP side of serving: server, OpenAI bodies and answers, text from tokens."""
