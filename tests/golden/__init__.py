"""Checks trol against a golden set: numbers that the official TroL code produced.

    python -m tests.golden DIR

DIR holds one tiny model (`config.json`, `weights.safetensors`, inputs and expected tensors), or the
`units`, numbers of single components. Nothing about a particular set is known here: sizes, cases
and counts are read from its files. Where the official numbers are accidents of its code, trol does
the right thing, the checker checks that, and the verdict says so ("own: ...").
"""
