"""The HTTP server: OpenAI's and DeepSeek's API over an engine that it knows by its client only."""
