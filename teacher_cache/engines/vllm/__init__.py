"""vLLM as an engine: its pooling runner makes this project's records beside the model, one small tensor per sequence.

`plugin` registers models in every vLLM process, `models` gives them `pooler`, which makes the records there; `wire`
packs them; `engine` is what a capture sees; `logprobs` makes do with what vLLM reports for any model.
"""
