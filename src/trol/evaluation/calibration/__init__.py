"""Calibration: thresholds that save most while a wanted share of the answers stays as it was.

`exits` finds when a token may leave the stack, `taus` which second visits a traversing model can
do without; `evidence` says what the answers to some questions show of all.
"""
