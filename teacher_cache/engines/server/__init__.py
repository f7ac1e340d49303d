"""A teacher that another machine serves: vLLM's OpenAI-compatible server, asked for the log-probs of our sequences.

`client` sends and retries requests; `served` asks what a server runs; `requests` turns a sequence into a request,
`replies` reads the reply; `engine` is what a capture sees.
"""
