"""VERIFY: `audit` attacks an unlearned model with every check of its family, and says how far it is from models that never saw the data."""

from .run import audit


__all__ = ["audit"]
