"""Serving: the inference engine, and the server with OpenAI's and DeepSeek's API in front of it."""
