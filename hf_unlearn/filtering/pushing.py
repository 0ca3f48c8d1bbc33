"""How a filter, and a pipeline with a filter around it, come to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..hub.objects import Written, check_options, publish
from ..hub.origin import check_is_not_original_repository


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


logger = logging.getLogger(__name__)


class FilterPushMixin:
    """A push by the allow-list. Who uses it has `save_pretrained`, and says what it is made from, and its card."""

    _commit_message: str

    def _made_from(self) -> list[str | None]:
        raise NotImplementedError

    def _card(self, repo_id: str, **metadata: Any) -> str:
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """As [`~hf_unlearn.publish`], which says what `options` there are; returns the commit alone."""
        return publish(self, repo_id, **{"show": logger.info} | options).commit

    @contextmanager
    def _written(self, repo_id: str, audit: Any, *, token: str | bool | None, **options: Any) -> Iterator[Written]:
        card, max_shard_size = options.pop("card", None), options.pop("max_shard_size", None)
        check_options(self, options, ("license", "language", "tags", "datasets"))
        if audit is not None:
            raise ValueError("audit: is of an unlearned model; a filter's card has figures of its own")
        if card is not None and (given := [name for name, value in options.items() if value]):
            raise ValueError(f"{given[0]}: given beside card, which has its own; keep one of them")
        originals = self._made_from()
        check_is_not_original_repository(repo_id, originals)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            text = self._card(repo_id, token=token, **options) if card is None else card
            Path(folder, "README.md").write_text(text, encoding="utf-8")
            yield Written(Path(folder), originals, self._commit_message)
