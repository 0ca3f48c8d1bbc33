"""How a filter, and a pipeline with a filter around it, come to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..hub.allowed import publishable_files
from ..hub.objects import Written, check_options, publish
from ..hub.origin import check_is_not_original_repository, hub_id
from ..hub.record import earlier_of, other_record, write_record
from .card import PAPER


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


logger = logging.getLogger(__name__)


class FilterPushMixin:
    """A push by the allow-list. Who uses it has `save_pretrained`, and says what it is made from, and its card."""

    _commit_message: str
    _kind: str

    def _made_from(self) -> list[str | None]:
        raise NotImplementedError

    def _card(self, repo_id: str, **metadata: Any) -> str:
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """As [`~hf_unlearn.publish`], which says what `options` there are; returns the commit alone."""
        return publish(self, repo_id, **{"show": logger.info} | options).commit

    def _check_audit(self, audit: Any) -> None:
        raise ValueError("audit: is of an unlearned model; a filter's card has figures of its own")

    @contextmanager
    def _written(self, repo_id: str, audit: Any, *, token: str | bool | None, **options: Any) -> Iterator[Written]:
        card, max_shard_size = options.pop("card", None), options.pop("max_shard_size", None)
        check_options(self, options, ("license", "language", "tags", "datasets"))
        if card is not None and (given := [name for name, value in options.items() if value]):
            raise ValueError(f"{given[0]}: given beside card, which has its own; keep one of them")
        originals = self._made_from()
        check_is_not_original_repository(repo_id, originals)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            text = self._card(repo_id, token=token, **options) if card is None else card
            Path(folder, "README.md").write_text(text, encoding="utf-8")
            self.write_record(folder, originals)
            yield Written(Path(folder), originals, self._commit_message)

    def write_record(self, folder: str | Path, originals: Sequence[str | None] | None = None) -> None:
        """Write `provenance.json` beside what was saved into a folder, and its card.

        Args:
            folder (`str` or `Path`): see there.
            originals (*optional*): what it is made from. Default: as it says itself.
        """
        originals = self._made_from() if originals is None else originals
        base = next((name for name in originals if hub_id(name)), None)
        method = {"name": "fast", "title": "FAST filter", "arxiv": PAPER}
        checker = getattr(self, "safety_checker", self)
        config = {
            "concepts": checker.config.concepts,
            "encoder": checker.config.encoder_spec,
            "fingerprint": checker.config.fingerprint,
        }
        chain = next((found for name in originals if (found := earlier_of(name))), [])
        record = other_record(self._kind, method=method, base_model=base, earlier=chain, config=config)
        write_record(record, folder, publishable_files(folder))
