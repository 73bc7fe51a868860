"""The checker of signatures that tests/test_axes.py puts around every function: see conftest.py."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float
