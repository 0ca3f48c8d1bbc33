"""The card of a filter: says what it blocks, what is promised and what gets past it; its code runs."""

import numpy as np
import pytest
import torch
from filter_data import bright_images, dark_images, fitted_filter, tiny_gan
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilteredPipeline, FilterEncoder
from hf_unlearn.filtering.card import filter_card


def blocks(content):
    return [part.split("```")[0] for part in content.split("```python\n")[1:]]


def vectors(count, shift=0.0, seed=0):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def of_latents(concepts=("undesired",), **fit):
    fitter = FASTFitter(concepts=concepts)
    for number, name in enumerate(fitter.concepts):
        fitter.update(undesired=vectors(30, 3.0 + number, seed=number), concept=name)
    fitter.update(clean=vectors(80, seed=8), unmarked=vectors(600, seed=9))
    return fitter.fit(**fit).checker()


def of_own(encode, name, **settings):
    """A filter with an encoder of the user's own."""
    fitter = FASTFitter(FilterEncoder.own(encode, name=name, **settings), score="mean_difference")
    fitter.update(undesired=bright_images(20, 3), clean=dark_images(20, 3))
    return fitter.fit(threshold="pooled_mean").checker()


@pytest.fixture
def card():
    """Parsed, as the Hub does."""

    def parsed(checker, *args, **kwargs):
        card = ModelCard(filter_card(checker.config, *args, **kwargs))
        assert card.data.tags == ["hf_unlearn", "safety-checker", "fast"]
        assert card.data.library_name == "hf_unlearn"
        return card

    return parsed


class TestWhatItSays:
    def test_a_name_with_a_bar(self, card):
        """Escaped in a table, and nowhere else."""
        found = card(of_latents({"a|b": ""}), "me/x")
        assert "| a\\|b | – |" in found.text
        assert all(result.metric_name.startswith("a|b: ") for result in found.data.eval_results)

    def test_concepts_with_their_figures(self, card):
        checker = of_latents({"sevens": "the digit 7,\nslanted | or not", "nines": ""})
        text = card(checker, "me/no-sevens").text
        assert text.strip().startswith("# no-sevens\n")
        assert "blocks what shows **sevens, nines**" in text
        assert "| sevens | the digit 7, slanted \\| or not |" in text
        assert "| nines | – |" in text
        for part, entry in zip(text.split("\n### ")[1:], checker.config.concepts, strict=True):
            figures = entry["figures"]
            assert part.startswith(f"{entry['name']}\n")
            assert f"| promise | {entry['threshold']['promise']} |" in part
            assert "| from | 30 undesired and 80 clean marks, 600 unmarked samples |" in part
            assert "`quadratic`: a Gaussian" in part
            for title, key, origin in (
                ("undesired samples that are blocked (recall)", "recall", ", cross-validation"),
                ("clean samples that are blocked (false alarms)", "false_alarm", ", calibration"),
                ("samples that are blocked", "blocked", ""),
                ("samples that are released", "release", ""),
            ):
                rate = figures[key]
                assert (
                    f"| {title} | {100 * rate['value']:.1f} % | {100 * rate['low']:.1f} to {100 * rate['high']:.1f} % | "
                    f"{rate['count']} of {rate['total']}{origin} |\n"
                ) in part
            residual = figures["residual"]
            assert (
                f"| undesired samples among the released (residual) | {100 * residual['value']:.1f} % | "
                f"{100 * residual['low']:.1f} to {100 * residual['high']:.1f} % | – |\n"
            ) in part
            assert f"| area under the ROC curve | {figures['auc']:.3f} | – | – |\n" in part

    def test_figures_for_the_hub(self, card):
        checker = of_latents()
        data, figures = card(checker, "me/filter").data, checker.config.concepts[0]["figures"]
        assert data.model_name == "filter"
        assert {result.metric_type: result.metric_value for result in data.eval_results} == {
            "recall": 100 * figures["recall"]["value"],
            "false_alarm": 100 * figures["false_alarm"]["value"],
            "roc_auc": figures["auc"],
        }

    def test_a_given_prevalence_and_no_promise(self, card):
        text = card(of_latents(prevalence=0.125, threshold="pooled_mean")).text
        assert "| undesired samples among all (prevalence) | 12.5 % | as given | – |" in text
        assert "| threshold | `pooled_mean` |\n| promise | none |" in text

    def test_a_threshold_that_was_set_by_hand(self, card):
        checker = of_latents()
        checker.set_threshold("undesired", 1.5)
        found = card(checker)
        assert "Nothing is known of how well it does: its threshold was set by hand." in found.text
        assert "| promise | none |" in found.text
        assert "| from |" not in found.text
        assert found.data.eval_results is None

    def test_what_remains_possible(self, card):
        text = " ".join(card(fitted_filter()).text.split())
        for words in (
            "It guards against accidents, not against someone who holds the weights",
            "the folder `pipeline/` of a saved filtered pipeline, loads and draws without the filter",
            "Callbacks of a pipeline see latents and images before the filter does",
            "What is unlike anything among the samples that it was learned from may pass",
            "https://arxiv.org/abs/2312.14895",
            "| versions | hf_unlearn ",
        ):
            assert words in text

    def test_it_survives_saving(self, tmp_path):
        for checker in (fitted_filter(), of_latents()):
            checker.save_pretrained(tmp_path / "filter")
            loaded = FASTSafetyChecker.from_pretrained(tmp_path / "filter")
            assert filter_card(loaded.config, "me/f") == filter_card(checker.config, "me/f")

    def test_text_cannot_break_out(self, card):
        found = card(of_latents({"x\n---\n# y": "{{ 7 * 7 }}\n## z"}))
        assert "**x --- # y**" in found.text
        assert "| x --- # y | {{ 7 \\* 7 }} ## z |" in found.text
        assert "\n# y" not in found.content

    def test_no_local_paths(self, tiny_resnet, tmp_path):
        """Neither of the encoder, nor of the filter."""
        from hf_unlearn.examples.classifier import digits_processor

        for part in (tiny_resnet, digits_processor()):
            part.save_pretrained(tmp_path / "an encoder")
        images = torch.rand(40, 1, 8, 8)
        fitter = FASTFitter(tmp_path / "an encoder", score="lda").update(
            undesired=images[:20] - 0.1, clean=images[20:] - 1
        )
        fitter.fit(threshold="pooled_mean").checker().save_pretrained(tmp_path / "filter")
        content = filter_card(FASTSafetyChecker.from_pretrained(tmp_path / "filter").config)
        assert str(tmp_path) not in content
        assert "| encoder | `an encoder`, stored here |" in content


class TestEncoders:
    def test_none(self, card):
        text = card(of_latents()).text
        assert "looks at the latents that a generator draws from" in text
        assert "| encoder | none: the generator's latents are judged as they are |" in text
        assert "StableDiffusionPipeline" not in text

    def test_from_the_hub(self, card):
        checker = fitted_filter()
        checker.config.encoder_spec |= {"name": "openai/clip-vit-base-patch32"}
        found = card(checker)
        assert found.data.base_model == "openai/clip-vit-base-patch32"
        link = "[openai/clip-vit-base-patch32](https://huggingface.co/openai/clip-vit-base-patch32)"
        assert f"| encoder | {link}, stored here |" in found.text
        checker.config.encoder_spec |= {"reference": {"id": "openai/clip-vit-base-patch32", "revision": "abc"}}
        assert f"| encoder | {link}, revision `abc`, not stored here" in card(checker).text

    def test_the_users_own(self, card):
        found = card(of_own(lambda images: images.flatten(1), "me/pixels"))
        assert found.data.base_model is None
        assert "`me/pixels`, the user's own, which is not stored here" in found.text
        assert "whoever loads it brings it along" in found.text


class TestCode:
    def ran(self, code, **names):
        exec(code, names)
        return names

    @pytest.mark.parametrize("repo_id", [None, "me/filter"])
    def test_alone(self, card, repo_id, tmp_path, monkeypatch):
        """In the folder of the filter, or by its id."""
        folder = tmp_path if repo_id is None else tmp_path / repo_id
        for checker in (fitted_filter(), fitted_filter(channels=1), of_latents()):
            checker.save_pretrained(folder)
            monkeypatch.chdir(folder if repo_id is None else tmp_path)
            names = self.ran(blocks(card(checker, repo_id).content)[0])
            assert len(names["output"].flags) == len(names["output"].scores) > 0

    def test_with_the_users_own_encoder(self, card, tmp_path, monkeypatch):
        def encode(images):
            return images.mean((2, 3)).repeat(1, 2)

        checker = of_own(encode, "mean colours", channels=3)
        checker.save_pretrained(tmp_path)
        monkeypatch.chdir(tmp_path)
        found = blocks(card(checker).content)
        assert self.ran(found[0], encode=encode)["output"].flags in ([True], [False])
        assert not any("FilteredPipeline" in code for code in found)
        (code,) = blocks(filter_card(checker.config, "me/it", inside="DDPMPipeline"))
        own = 'filter_encoder=FilterEncoder.own(encode, name="mean colours", channels=3)'
        assert f'from_pretrained("me/it", {own})' in code

    @pytest.mark.parametrize("latents", [False, True])
    def test_around_a_pipeline(self, card, latents, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        checker, folder = fitted_filter(), "me/gan"
        if latents:
            fitter = FASTFitter(score="mean_difference")
            fitter.update(undesired=vectors(9)[:, :4], clean=vectors(9, 1)[:, :4])
            checker = fitter.fit(threshold="pooled_mean").checker()
        checker.save_pretrained("filter")
        tiny_gan().save_pretrained(folder)
        code = blocks(card(checker, "filter", pipeline_id=folder).content)[1]
        pipe = self.ran(code)["pipe"]
        assert pipe.action == "regenerate"
        assert len(pipe(num_images=2).filtered) == 2
        assert isinstance(FilteredPipeline.from_pretrained("filtered"), FilteredPipeline)
        assert '"folder or id of a pipeline"' in blocks(card(checker).content)[1]

    def test_in_the_slot(self, card, tiny_stable_diffusion, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        checker = fitted_filter()
        checker.set_threshold("bright", -1e9)  # blocks everything
        checker.save_pretrained("filter")
        tiny_stable_diffusion.save_pretrained("sd")
        code = blocks(card(checker, "filter").content)[2].replace("folder or id of a pipeline", "sd")
        output = self.ran(code)["pipe"]("a photo", num_inference_steps=2, output_type="np")
        assert output.nsfw_content_detected == [True]
        assert not np.asarray(output.images).any()


def test_names_are_ids():
    """What the card shows as an example is none that somebody could register."""
    with pytest.raises(ValueError):
        validate_repo_id("folder or id of a pipeline")


def test_card_of_a_filtered_pipeline_loads_it(tmp_path, monkeypatch):
    checker = fitted_filter()
    FilteredPipeline(tiny_gan(), checker).save_pretrained(tmp_path)
    content = filter_card(checker.config, inside="GANPipeline")
    assert "A `GANPipeline` with a filter around it" in content
    assert ModelCard(content).data.tags == ["hf_unlearn", "safety-checker", "fast", "diffusers"]
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(content)
    scope = {}
    exec(code, scope)
    assert isinstance(scope["pipe"], FilteredPipeline)
    assert scope["pipe"].safety_checker.thresholds == checker.thresholds
