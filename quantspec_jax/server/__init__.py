"""A server that speaks OpenAI's interface, and its page. Needs the extra `serve`."""
