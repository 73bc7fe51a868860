"""`python -m trol` is the `trol` command, and so is `torchrun -m trol` in many processes."""

from trol.cli import main

if __name__ == "__main__":
    main()
