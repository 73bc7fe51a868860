"""What trol assumes of transformers, torch, PEFT and bitsandbytes, in one room.

Nothing outside this room (and `family/`, where it subclasses) names a private or internal thing
of theirs. Names are found by looking at signatures and attributes, never at a version; what is
taken for granted stands in the table `trol.host.assumptions.ASSUMPTIONS`, each row with its check.
"""
