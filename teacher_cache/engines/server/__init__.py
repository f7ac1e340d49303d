"""A teacher that another machine serves: vLLM's OpenAI-compatible server, asked for the log-probs of our sequences.

`client` sends requests and tries again; `served` asks what a server runs; `requests` words a sequence as a request,
`replies` reads what comes back; `engine` is what a capture sees.
"""
