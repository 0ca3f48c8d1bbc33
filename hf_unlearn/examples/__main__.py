"""`python -m hf_unlearn.examples NAME [--seed N]`: makes a small model where it is not there yet, and prints its folder."""

import argparse
import sys

from .named import NAMES, made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m hf_unlearn.examples", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise")
    parser.add_argument("--quiet", action="store_true", help="do not say that it is trained, and how long that takes")
    given = parser.parse_args()
    try:
        print(made(given.name, seed=given.seed, progress=not given.quiet))
    except KeyboardInterrupt:
        sys.exit(130)
