"""What is set for a while and is as it was afterwards."""

import pytest
import torch

from hf_unlearn.examples.classifier import train_classifier
from hf_unlearn.modes import one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("said", "within"), [(None, 1), ("2", 2)])
class TestOneThread:
    @pytest.fixture(autouse=True)
    def environment(self, two_threads, said, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if said is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", said)

    def test_unless_somebody_has_said_how_many(self, within):
        with one_thread():
            assert torch.get_num_threads() == within
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2

    def test_a_small_classifier_is_trained_so(self, within, digits, tmp_path):
        seen = set()

        def looked_at(rows):
            seen.add(torch.get_num_threads())
            return rows

        rows = digits["train"].select(range(8)).with_transform(looked_at)
        train_classifier(rows, tmp_path / "model", max_steps=1, progress=False)
        assert seen == {within}
        assert torch.get_num_threads() == 2
