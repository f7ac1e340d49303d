"""vLLM as an engine: its pooling runner makes this project's records beside the model, one small tensor a sequence.

`plugin` names models to every process of vLLM's, `models` gives them `pooler`, which makes the records there; `wire`
packs them; `engine` is what a capture sees; `logprobs` makes do with what vLLM says of any model.
"""
