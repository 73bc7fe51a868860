"""The TroL checkpoints as they were published (BK-Lee/TroL-1.8B, -3.8B, -7B), opened as they are.

`naming` says what can name one, `files` finds the tensors, `layouts` says what each is called and
becomes, `configs` makes the configuration (`stated`: what config.json says, `kinds`: what it may
say, `ropes`: its RoPE), `gates` the gates, `weights` the mapping that is read tensor by tensor,
`opening` the model; `quantisation` says what may be quantised, and `conversion` writes a plain TroL
folder, in `shards`, where `claims` lets it.
"""
