"""The card as a reader and the Hub get it, and snippets that run."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from fresh import run_python
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import (
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    ViTModel,
)

from hf_unlearn.hub.card import Figure, unlearning_card
from hf_unlearn.hub.loading import diffusion_task, loading_code
from hf_unlearn.hub.origin import origin
from hf_unlearn.hub.provenance import Provenance


PROVENANCE = Provenance(
    method="PBU",
    method_title="A method",
    forgotten="class 3",
    forget_examples=108,
    seed=7,
    steps=90,
    stands_on={"another's loss": "2403.00002"},
    paper="2403.00001",
    base_model="me/digits",
    base_revision="abc123",
    hyperparameters={"learning_rate": 1e-4, "pattern": "a|b"},
    forget_fingerprint="ab" * 32,
    versions={"torch": "1.0"},
    hardware="1 × H200",
    created="2020-02-29",
)
FIGURES = [
    Figure(metric="accuracy", name="Forgotten class", before=97.5, after=np.float32(0.5), retrained=0.0),
    Figure(metric="accuracy", name="Other classes", before=98.25, after=97.125),
    Figure(metric="auc", name="Membership attack", after=0.51234, split="train", unit=""),
]


def saved(card, tmp_path):
    """The card as the Hub would read it."""
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


class TestUnlearningCard:
    def test_metadata_survives_the_file(self, tmp_path):
        card = unlearning_card(
            PROVENANCE,
            model_name="digits-without-3",
            pipeline_tag="image-classification",
            license="apache-2.0",
            tags=["digits", "hf_unlearn"],
            results=FIGURES,
            dataset_name="Digits",
            dataset_type="me/digits-data",
        )
        card = saved(card, tmp_path)
        data = card.data
        assert (data.base_model, data.library_name, data.license) == ("me/digits", "transformers", "apache-2.0")
        assert (data.pipeline_tag, data.model_name) == ("image-classification", "digits-without-3")
        assert data.tags == ["machine-unlearning", "hf_unlearn", "digits"]
        assert data.metrics == ["accuracy", "auc"]
        found = [(r.metric_type, r.metric_name, r.metric_value, r.dataset_split) for r in data.eval_results]
        assert found == [
            ("accuracy", "Forgotten class", 0.5, "test"),
            ("accuracy", "Other classes", 97.125, "test"),
            ("auc", "Membership attack", 0.51234, "train"),
        ]
        for result in data.eval_results:
            assert (result.task_type, result.dataset_name) == ("image-classification", "Digits")
            assert result.dataset_type == "me/digits-data"
        header = yaml.safe_load(card.content.split("---")[1])  # plain YAML, no NumPy in it
        assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5

    def test_table_of_figures(self):
        text = unlearning_card(PROVENANCE, model_name="m", results=FIGURES).text
        table = text[text.index("| | split |") :].split("\n\n")[0].splitlines()
        assert table[2:] == [
            "| Forgotten class | test | 97.50 % | 0.50 % | 0.00 % |",
            "| Other classes | test | 98.25 % | 97.12 % | – |",
            "| Membership attack | train | – | 0.5123 | – |",
        ]
        assert "trained from scratch without the forget set" in text
        assert "no model retrained" in unlearning_card(PROVENANCE, model_name="m", results=FIGURES[1:]).text
        for field in ("before", "after", "retrained"):
            with pytest.raises(ValueError, match=f"{field}=nan"):
                Figure(**{"metric": "accuracy", "name": "x", "after": 1.0, field: float("nan")})

    def test_says_how_it_was_made(self):
        text = unlearning_card(PROVENANCE, model_name="m").text
        rows = text[text.index("## How it was made") :].split("\n\n")[1].splitlines()
        assert rows[2:] == [
            "| method | A method (PBU), [arXiv:2403.00001](https://arxiv.org/abs/2403.00001) |",
            "| stands on | another's loss, [arXiv:2403.00002](https://arxiv.org/abs/2403.00002) |",
            "| base model | [me/digits](https://huggingface.co/me/digits), revision `abc123` |",
            "| optimiser steps | 90 |",
            "| seed | 7 |",
            "| made on | 2020-02-29 |",
            "| `learning_rate` | 0.0001 |",
            '| `pattern` | "a\\|b" |',
            "| hardware | 1 × H200 |",
            "| versions | torch 1.0 |",
            f"| fingerprint of the forget set | `{'ab' * 32}` |",
        ]
        assert "class 3" in text.split("##")[0]
        assert "108 examples" in text.split("##")[0]

    def test_says_what_was_checked_and_what_it_does_not_show(self):
        text = unlearning_card(PROVENANCE, model_name="m").text
        assert "No audit was run" in text
        assert "## Figures" not in text
        assert "None of the checks" not in text
        for results in ([], FIGURES):
            failed = ["one", "two\nlines"]
            text = unlearning_card(PROVENANCE, model_name="m", results=results, failed_checks=failed).text
            assert "\n- one\n- two lines\n" in text
            assert "None of the checks" not in text
        text = unlearning_card(PROVENANCE, model_name="m", results=FIGURES, limitations=["Only digits."]).text
        assert "No check was run. The figures above are all" in text
        assert "None of the checks" not in text
        limits = text[text.index("## Limitations") :]
        for part in ("not proof of forgetting", "features", "retrained", "- Only digits."):
            assert part in limits

    def test_a_figure_with_a_target_is_a_check(self):
        """Of a run that failed the card says so, and of none that it made anything forget."""
        figure = Figure(metric="accuracy", name="Forgotten class", before=98, after=80, target=1)
        for after, words, others in (
            (80, "These checks did not pass:", "None of the checks"),
            (0.5, "None of the checks that were run failed:", "did not pass"),
        ):
            text = unlearning_card(PROVENANCE, model_name="m", results=[replace(figure, after=after)]).text
            assert f"Forgotten class (test): 98.00 % → {after:.2f} %." in text.split("##")[0]
            assert "was asked to forget **class 3**" in text
            assert "made to forget" not in text
            assert words in text
            assert others not in text
            assert f"- Forgotten class (test): {after:.2f} %, " in text
        assert "@misc{arXiv:2403.00001, eprint={2403.00001}" in text

    def test_metadata_of_licenses_languages_and_relations(self, tmp_path):
        given = {"license": "other", "license_name": "mine", "license_link": "https://a.b", "language": ["en", "fr"]}
        card = saved(unlearning_card(PROVENANCE, model_name="m", datasets="me/data", tags="x", **given), tmp_path)
        found = card.data.to_dict()
        assert {name: found[name] for name in given} == given
        assert (found["datasets"], found["base_model_relation"]) == ("me/data", "finetune")
        assert found["tags"] == ["machine-unlearning", "hf_unlearn", "x"]
        here = replace(PROVENANCE, base_model="/somewhere/else")
        assert "base_model_relation" not in unlearning_card(here, model_name="m").data.to_dict()
        further = unlearning_card(here, model_name="m", base_model="me/further").data.to_dict()
        assert (further["base_model"], further["base_model_relation"]) == ("me/further", "finetune")

    @pytest.mark.parametrize("base_model", ["{tmp}", "/somewhere/else/secret", "../secret"])
    def test_a_local_base_model_stays_private(self, base_model, tmp_path):
        (tmp_path / "secret").mkdir()
        base_model = base_model.format(tmp=tmp_path / "secret")
        provenance = replace(PROVENANCE, base_model=base_model)
        card = saved(unlearning_card(provenance, model_name="m"), tmp_path)
        assert card.data.base_model is None
        assert "secret" not in card.content
        assert "not on the Hub" in card.text

    def test_a_folder_that_looks_like_an_id_is_not_one(self, tmp_path, monkeypatch):
        (tmp_path / "me/digits").mkdir(parents=True)
        local = origin(tmp_path / "me/digits")
        assert unlearning_card(PROVENANCE, model_name="m").data.base_model == "me/digits"
        known = replace(PROVENANCE, base_model=origin("me/digits"))
        monkeypatch.chdir(tmp_path)
        assert unlearning_card(PROVENANCE, model_name="m").data.base_model is None
        # What it is was decided when it was loaded.
        assert saved(unlearning_card(known, model_name="m"), tmp_path).data.base_model == "me/digits"
        assert (
            unlearning_card(replace(PROVENANCE, base_model=origin("me/digits")), model_name="m").data.base_model
            is None
        )
        monkeypatch.chdir("/")
        assert unlearning_card(replace(PROVENANCE, base_model=local), model_name="m").data.base_model is None

    def test_text_cannot_break_out(self, tmp_path):
        values = {**vars(PROVENANCE), "forgotten": "x\n---\n# y", "hyperparameters": {"a": "{{ 7 * 7 }}\n|"}}
        card = saved(unlearning_card(Provenance(**values), model_name="m", results=FIGURES), tmp_path)
        assert "**x --- # y**" in card.text
        assert '| `a` | "{{ 7 \\* 7 }}\\\\n\\|" |' in card.text
        assert len(card.data.eval_results) == len(FIGURES)

    def test_picture_is_one_that_gets_published(self):
        assert "](<pictures/a b.png>)" in unlearning_card(PROVENANCE, model_name="m", picture="pictures/a b.png").text
        for picture in ("a.png", "_private/a.png", "pictures/a.svg", "pictures/../_private/a.png"):
            with pytest.raises(ValueError, match="picture="):
                unlearning_card(PROVENANCE, model_name="m", picture=picture)

    def test_of_a_pipeline(self, tmp_path):
        tag, picture = diffusion_task(DDPMPipeline), "pictures/samples.png"
        card = unlearning_card(PROVENANCE, model_name="m", library_name="diffusers", pipeline_tag=tag, picture=picture)
        card = saved(card, tmp_path)
        assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "unconditional-image-generation")
        assert "Stock `diffusers` loads it" in card.text
        assert "\n\n![Samples](<pictures/samples.png>)\n" in card.text
        limitations = card.text[card.text.index("## Limitations") :]
        assert limitations.startswith("## Limitations\n\n- Samples that do not show")
        assert "accuracy" not in limitations


def snippet(code, **options):
    """As readers get it from a card."""
    text = unlearning_card(PROVENANCE, model_name="m", load_snippet=code, **options).text
    return text.split("```python\n")[1].split("```")[0]


class TestLoadingCode:
    def test_the_snippet_in_the_card_runs(self, tmp_path):
        config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
        folder = str(tmp_path / "a model")
        ResNetForImageClassification(config).save_pretrained(folder)
        code = snippet(loading_code(ResNetForImageClassification, folder))
        assert "AutoModelForImageClassification" in code
        assert run_python(code + "\nprint(type(model).__name__)").stdout.strip() == "ResNetForImageClassification"

    def test_auto_class(self):
        for model_class, auto in (
            (GPT2LMHeadModel, "AutoModelForCausalLM"),
            (T5ForConditionalGeneration, "AutoModelForSeq2SeqLM"),
            (ViTModel, "AutoModel"),
        ):
            assert f'model = {auto}.from_pretrained("me/m")' in loading_code(model_class, "me/m").splitlines()

    def test_a_class_from_elsewhere_is_imported_from_there(self):
        class Mine(GPT2LMHeadModel):
            pass

        assert loading_code(Mine, "me/m", processor="AutoTokenizer").splitlines() == [
            f"from {__name__} import Mine",
            "from transformers import AutoTokenizer",
            "",
            'model = Mine.from_pretrained("me/m")',
            'processor = AutoTokenizer.from_pretrained("me/m")',
        ]

    def test_arguments_of_the_other_kind(self):
        with pytest.raises(ValueError, match="processor='AutoTokenizer'"):
            loading_code(DDPMPipeline, "me/m", processor="AutoTokenizer")
        for name, value in (("lora_base", "me/base"), ("num_inference_steps", 5)):
            with pytest.raises(ValueError, match=f"{name}={value!r}"):
                loading_code(ViTModel, "me/m", **{name: value})


class TestPipelines:
    def ran(self, code):
        """The image that the snippet draws."""
        names = {}
        exec(snippet(code, library_name="diffusers"), names)
        return np.asarray(names["image"])

    def drawn(self, pipeline, *args, **kwargs):
        return np.asarray(pipeline(*args, **kwargs, generator=torch.Generator().manual_seed(0)).images[0])

    def test_unconditional(self, tiny_ddpm, tmp_path):
        folder = str(tmp_path / "a pipeline")
        tiny_ddpm.save_pretrained(folder)
        code = loading_code(DDPMPipeline, folder, num_inference_steps=5)
        assert f'pipeline = DDPMPipeline.from_pretrained("{folder}")' in code.splitlines()
        np.testing.assert_allclose(self.ran(code), self.drawn(tiny_ddpm, num_inference_steps=5), atol=1)

    def test_text_to_image_and_a_lora(self, tiny_stable_diffusion, tmp_path):
        pipeline, base, lora = tiny_stable_diffusion, str(tmp_path / "base"), str(tmp_path / "lora")
        pipeline.save_pretrained(base)
        before = self.drawn(pipeline, "a photo", num_inference_steps=2)
        code = loading_code(StableDiffusionPipeline, base)
        assert 'image = pipeline("a photo", generator=torch.Generator().manual_seed(0)).images[0]' in code
        code = loading_code(StableDiffusionPipeline, base, num_inference_steps=2)
        np.testing.assert_allclose(self.ran(code), before, atol=1)
        torch.manual_seed(0)
        pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_v"], init_lora_weights=False))
        with torch.no_grad():
            for name, weight in pipeline.unet.named_parameters():
                weight.mul_(20 if "lora_B" in name else 1)
        after = self.drawn(pipeline, "a photo", num_inference_steps=2)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        pipeline.save_lora_weights(lora, unet_lora_layers=layers)
        drawn = self.ran(loading_code(type(pipeline), lora, lora_base=base, num_inference_steps=2))
        np.testing.assert_allclose(drawn, after, atol=1)
        assert np.abs(drawn.astype(int) - before).max() > 5

    def test_a_pipeline_from_elsewhere_is_imported_from_there(self):
        class Mine(DDPMPipeline):
            def __call__(self, image, batch_size=1, generator=None): ...

        assert loading_code(Mine, "me/m").splitlines() == [
            f"from {__name__} import Mine",
            "",
            'pipeline = Mine.from_pretrained("me/m")',
        ]

    @pytest.mark.parametrize(
        ("pipelines", "task"),
        [
            (["DDPM", "DDIM"], "unconditional-image-generation"),
            (["StableDiffusion", "StableDiffusionXL", "Flux"], "text-to-image"),
            (["StableDiffusionImg2Img", "StableDiffusionInpaint", "DiT", "TextToVideoSD", "StableAudio"], None),
        ],
    )
    def test_task(self, pipelines, task):
        assert {diffusion_task(getattr(diffusers, f"{name}Pipeline")) for name in pipelines} == {task}

    def test_no_task_where_more_must_be_said(self):
        class Styled(DDPMPipeline):
            def __call__(self, style, prompt=None, height=None, generator=None): ...

        class Labelled(DDPMPipeline):
            def __call__(self, label, batch_size=1, generator=None): ...

        class Unseeded(DDPMPipeline):
            def __call__(self, prompt, height=None): ...

        assert {diffusion_task(kind) for kind in (Styled, Labelled, Unseeded)} == {None}
