import pytest

from hf_unlearn.examples.facts import FactsRecipe, facts_data, kinds, known_share
from hf_unlearn.examples.opinions import train_tokenizer


@pytest.fixture(scope="module")
def data():
    return facts_data(40, share=0.1, held_out=8, general=30)


class TestData:
    def test_people_are_on_one_side_each(self, data):
        people = {split: set(data[split]["person"]) for split in ("forget", "retain", "held_out")}
        assert [len(names) for names in people.values()] == [4, 36, 8]
        assert len(set.union(*people.values())) == 48
        surnames = [name.split()[1] for name in set.union(*people.values())]
        assert len(set(surnames)) == 48
        assert set(data["general"]["person"]) == set(data["general_held_out"]["person"]) == {""}

    def test_every_fact_is_asked_once_and_answered_rightly(self, data):
        assert len(kinds()) >= 5
        for split in ("forget", "retain", "held_out"):
            pairs = list(zip(data[split]["person"], data[split]["kind"], strict=True))
            assert len(set(pairs)) == len(pairs) == len(kinds()) * len(set(data[split]["person"]))
            for row in data[split]:
                assert row["person"] in row["question"]
                assert row["person"] in row["paraphrased_question"]
                assert row["value"] in row["answer"]
                assert row["value"] in row["paraphrased_answer"]
                assert row["question"] != row["paraphrased_question"]
                assert len(set(row["perturbed_answers"])) == 5
                assert not any(row["value"] in answer for answer in row["perturbed_answers"])

    def test_training_rows_are_what_is_learnt(self, data):
        learnt = [id for split in ("forget", "retain", "general") for id in data[split]["id"]]
        assert sorted(data["train"]["id"]) == sorted(learnt)
        assert data["train"]["id"] != learnt
        questions = {row["id"]: row["question"] for split in ("forget", "retain", "general") for row in data[split]}
        assert all(row["prompt"][0]["content"] == questions[row["id"]] for row in data["train"])
        assert not set(data["held_out"]["id"]) & set(learnt)

    def test_the_seed_decides(self, data):
        again, other = (facts_data(40, share=0.1, held_out=8, general=30, seed=seed) for seed in (0, 1))
        assert again["train"][:] == data["train"][:]
        assert len(set(other["retain"]["person"]) & set(data["retain"]["person"])) < 5

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"share": 0.001}, "share=0.001: leaves nobody to forget of 40"),
            ({"share": 1}, "share=1: leaves nobody to keep of 40"),
            ({"people": 1000}, "people=1000: with held_out=20 at most 528 have a name"),
        ],
    )
    def test_bad_input_is_refused(self, settings, match):
        with pytest.raises(ValueError, match=match):
            facts_data(**({"people": 40} | settings))


def test_a_share_needs_rows(data):
    tokenizer = train_tokenizer(data["train"]["prompt"][0][0]["content"], vocab_size=300)
    with pytest.raises(ValueError, match="rows: is empty"):
        known_share(None, tokenizer, data["forget"].select([]))


@pytest.mark.slow
def test_a_small_model_learns_them_by_heart(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_unlearn.examples.facts import facts_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = FactsRecipe(people=10, share=0.2, general=10, epochs=40)
    folder = facts_model(recipe, progress=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    data = recipe.data()
    assert known_share(model, tokenizer, data["forget"]) > 0.9
    assert known_share(model, tokenizer, data["held_out"]) < 0.3  # one in 25 or 30 by chance
