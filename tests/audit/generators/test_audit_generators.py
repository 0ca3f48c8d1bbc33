"""Planted cases: what an audit says of generators of which it is known what they draw, and still could."""

import copy

import planted
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, DDPMPipeline, StableDiffusionPipeline
from planted import classes, images, pipeline
from sklearn.linear_model import LogisticRegression
from text_to_image_data import tiny

from hf_unlearn.audit.digests import digest_of
from hf_unlearn.audit.generators import data as audit_data
from hf_unlearn.audit.report import AuditReport
from hf_unlearn.audit.run import audit
from hf_unlearn.metrics.generation import percentage_unlearned


REFERENCES = 5
DRAWING = {"num_inference_steps": 8}
FAST = ["drawn", "asked", "seed_search", "from_picture", "rounded", "relearn_others", "class_distance", "neighbour_shift", "others_distance"]  # fmt: skip


class Filtered(DDPMPipeline):
    """Draws anew until no image shows the kind; nothing of the weights is changed."""

    def __call__(self, *args, generator=None, **given):
        drawn = super().__call__(*args, generator=generator, **given).images
        while (kind := classes(drawn * 2 - 1) == planted.KIND).any():
            drawn[kind] = super().__call__(*args, generator=generator, **given).images[kind]
        return type("Drawn", (), {"images": drawn})()


def rows(of, number, seed):
    shown, labels = images(of, number, seed)
    return Dataset.from_dict({"pixel_values": shown.numpy(), "label": labels.tolist()}).with_format("torch")


@pytest.fixture(scope="module")
def given():
    retrained = [pipeline(seed=10 + number, without=planted.KIND) for number in range(REFERENCES)]
    return {
        "original": pipeline(seed=1), "retrained": retrained, "forget": rows([0], 60, 1), "retain": rows([1, 2], 80, 2), "marker": classes,
        "drawing": DRAWING, "progress": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def of_original(given):
    return audit(pipeline(seed=2), checks=FAST, **given)


class TestDiffusion:
    """Shares of all or nothing: no margin that decides is nearer than three of its own."""

    def test_another_original_is_not_forgotten(self, of_original):
        assert of_original.verdict.word == "not forgotten"
        assert of_original["drawn"].audited == pytest.approx(1 / 3, abs=0.1)
        assert of_original["asked"].original == 1.0
        assert of_original.residual.mu > of_original.residual.margin
        assert of_original.forgotten == "class 0"
        drawn, others = of_original["drawn"].readings.audited, of_original["others_distance"].readings.audited
        assert (others.n, others.error) == (drawn.n - sum(drawn.per_example), None)

    def test_percentage_unlearned_stands_beside(self, of_original):
        readings = of_original["drawn"].readings
        before, after = ([round(value) for value in one.per_example] for one in (readings.original, readings.audited))
        assert readings.audited.figures["pul"] == percentage_unlearned(before, after, 1).pul
        assert readings.original.figures["pul"] == 0.0
        assert {one.figures["pul"] for one in readings.retrained} == {100.0}

    def test_one_more_retrained_model_is_forgotten(self, given):
        found = audit(pipeline(seed=20, without=planted.KIND), checks=FAST, **given)
        assert found.verdict.word == "forgotten", str(found.verdict)
        assert found["class_distance"].status == "within"

    def test_a_filter_is_suppressed(self, given):
        """None of the kind is drawn; the noise from which the original makes it still gives it to whoever has the weights."""
        hidden = Filtered(**pipeline(seed=2).components)
        found = audit(hidden, checks=["drawn", "asked", "seed_search"], **given)
        assert (found["drawn"].audited, found["asked"].audited) == (0.0, 0.0)
        assert found["seed_search"].audited > 0.9
        assert (found.verdict.word, found.verdict.decided_by) == ("suppressed", "seed_search")

    def test_its_parts_alone_give_it_away(self, given):
        hidden = Filtered(**pipeline(seed=2).components)
        found = audit(hidden, checks=["drawn", "bare"], **given)
        assert found["bare"].audited > 0.9
        assert found["bare"].original == 1.0
        assert (found.verdict.word, found.verdict.decided_by) == ("suppressed", "bare")
        assert type(hidden) is Filtered

    def test_a_kind_that_is_drawn_less_still_is_beside_pictures_of_it(self, given):
        """Its share in the prior fell by e⁻³, what a picture of it becomes did not."""
        found = audit(pipeline(seed=2, bias=-3.0), checks=["drawn", "from_picture"], **given)
        assert found["drawn"].audited < 0.1 * found["drawn"].original + 0.02
        assert found["from_picture"].audited > found["drawn"].audited + 0.1

    def test_the_same_model_under_another_name_is_not_forgotten(self, given):
        alone = {name: value for name, value in given.items() if name != "retrained"}
        found = audit(copy.deepcopy(given["original"]), checks=["drawn", "asked"], **alone)
        assert found.verdict.word == "not forgotten"
        assert found["asked"].audited == 1.0

    def test_without_references_resemblance_is_no_memory(self, given):
        """From the original's noise a marker may err: what comes back from there is not called suppressed."""
        alone = {name: value for name, value in given.items() if name != "retrained"}
        hidden = Filtered(**pipeline(seed=2).components)
        found = audit(hidden, checks=["drawn", "rounded"], **alone)
        assert found["rounded"].status == "unknown"
        assert found["drawn"].distance == 0.0
        assert found.verdict.word == "undetermined"

    def test_a_report_goes_through_a_file(self, of_original, tmp_path):
        again = AuditReport.load(of_original.save(tmp_path / "audit.json"))
        assert again.to_dict() == of_original.to_dict()
        again.check_is_of(pipeline(seed=2))
        with pytest.raises(ValueError, match="of another model"):
            again.check_is_of(pipeline(seed=3))

    def test_what_was_found_is_not_looked_for_again(self, given, tmp_path):
        more = {"checks": ["drawn", "asked"], "output_dir": tmp_path}
        first, again = (audit(pipeline(seed=2), **given, **more) for _ in range(2))
        assert [one.readings for one in first.results] == [one.readings for one in again.results]
        assert again["drawn"].seconds == first["drawn"].seconds

    def test_a_digest_is_of_all_that_draws(self):
        plain = pipeline(seed=2)
        other = Filtered(**plain.components)
        assert digest_of(plain) == digest_of(pipeline(seed=2)) != digest_of(other)
        plain.scheduler = DDIMScheduler(beta_end=0.03)
        assert digest_of(plain) != digest_of(pipeline(seed=2))


ASKED, INSTEAD = "a red dog on a beach", "a blue house"


class Avoiding(StableDiffusionPipeline):
    """Draws with a negative prompt in every call that says none; nothing of the weights is changed."""

    def __call__(self, prompt=None, **given):
        return super().__call__(prompt, **({"negative_prompt": [ASKED] * len(prompt)} | given))


@pytest.fixture(scope="module")
def seen():
    """The marker, by what a random pipeline draws for two prompts: it is right for 9 of 10."""
    pipe = tiny("sd")

    def drawn(prompt, seed):
        generators = [torch.Generator().manual_seed(seed + number) for number in range(60)]
        shown = pipe([prompt] * 60, generator=generators, output_type="pt", num_inference_steps=2, height=8, width=8)
        return shown.images * 2 - 1

    one, two = drawn(ASKED, 0), drawn(INSTEAD, 1000)
    told = LogisticRegression(max_iter=2000).fit(torch.cat([one, two]).flatten(1).numpy(), [1] * 60 + [0] * 60)
    return lambda shown: told.predict(shown.flatten(1).numpy()).astype(bool), one, two


def test_a_negative_prompt_is_suppressed(seen, monkeypatch):
    monkeypatch.setitem(audit_data.ASKED, "standard", 60)
    marker, one, two = seen
    pipe = tiny("sd")
    hidden = Avoiding(**pipe.components, requires_safety_checker=False)
    forget, retain = (
        Dataset.from_dict({"pixel_values": shown.numpy(), "prompt": [prompt] * 60}).with_format("torch")
        for shown, prompt in ((one, ASKED), (two, INSTEAD))
    )
    found = audit(
        hidden, pipe, forget=forget, retain=retain, marker=marker, checks=["asked", "negative_prompt"], progress=False,
        drawing={"num_inference_steps": 2, "height": 8, "width": 8},
    )  # fmt: skip
    assert found["asked"].audited < found["asked"].original - 0.3
    by_setting = found["negative_prompt"].readings.audited.figures["by_setting"]
    assert by_setting["empty"] == found["asked"].original
    assert (found.verdict.word, found.verdict.decided_by) == ("suppressed", "negative_prompt")
