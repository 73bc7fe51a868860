"""The TroL checkpoints as they were published (BK-Lee/TroL-1.8B, -3.8B, -7B), opened as they are.

`files` reads tensors and JSON, `configs` makes the configuration, `layouts` says what each tensor
is called and becomes, `processors` makes the processor, `opening` finds a checkpoint and opens its
model, and `conversion` writes it as a plain TroL folder. Of `trol.family` this room imports
`configuration`, `internlm2` and `memory`; only `conversion` imports the model and the processor.
"""
