"""`hf-unlearn unlearn --method redirect` from recipe to saved pipeline: what it writes, says and refuses."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from text_to_image_data import latents, tiny

from hf_unlearn import cli, redirect_concept
from hf_unlearn.unlearning.diffusion.pipelines import text_side_of


KEPT = ["a red house", "the old blue guitar"]
COMMON = (
    "--method", "redirect", "--concept", "cat", "--anchor", "horse", "--keep", *KEPT, "--num_inference_steps", "2", "--grid_images", "2",
    "--output_dir", "out",
)  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny("sd").save_pretrained("original")
    return tmp_path


def unlearn(*arguments):
    return cli.main(["unlearn", *COMMON, *arguments])


class TestRuns:
    def test_writes_a_pipeline_that_stock_diffusers_loads(self, work, capsys):
        assert unlearn("--model", "original") == 0
        shown = capsys.readouterr().out
        expected = redirect_concept(tiny("sd"), "cat", anchor="horse", keep=KEPT, measure=False)
        loaded = StableDiffusionPipeline.from_pretrained("out")
        for layer, other in zip(text_side_of(loaded).layers, text_side_of(expected).layers, strict=True):
            assert torch.equal(layer.linear.weight, other.linear.weight)
        assert "cat is now answered as horse" in shown
        assert 'StableDiffusionPipeline.from_pretrained("out")' in shown
        card = ModelCard.load("out/README.md")
        (figure,) = card.data.eval_results
        assert figure.metric_type == "prompt_effect"
        assert f"7.5 before, {figure.metric_value:.3g} after" in shown
        assert "2308.14761" in card.text
        assert {"cat", "horse"}.isdisjoint(card.text.replace(",", " ").split())  # it does not say what was forgotten
        assert str(work) not in "".join(file.read_text() for file in Path("out").rglob("*.json"))
        assert {file.name for file in Path("out/_private/samples").iterdir() if file.suffix} == {
            "before.png",
            "after.png",
        }

    def test_or_a_lora(self, work):
        assert unlearn("--model", "original", "--lora_rank", "8") == 0
        assert not Path("out/model_index.json").exists()
        pipe = StableDiffusionPipeline.from_pretrained("original")
        pipe.load_lora_weights("out", weight_name="pytorch_lora_weights.safetensors")
        expected = redirect_concept(tiny("sd"), "cat", anchor="horse", keep=KEPT, measure=False)
        before, now, wanted = (latents(which, ["a photo of a cat"]) for which in (tiny("sd"), pipe, expected))
        assert (now - wanted).norm() < 0.01 * (now - before).norm()

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (("--model", "original", "--output_dir", "original"), 2, "output_dir: "),
            (("--model", "original", "--concept", "cat", "--anchor", "cats"), 1, "anchor='cats': names 'cats'"),
            (("--model", "nowhere"), 1, "model='nowhere': neither a folder with a pipeline nor an id on the Hub"),
            (("--model", "original", "--strength", "0"), 2, "strength=0.0: must be > 0"),
        ],
    )
    def test_refused_in_one_line(self, work, capsys, arguments, code, message):
        given = list(arguments)
        common = list(COMMON)
        for key in {word for word in given if word.startswith("--")} & set(common):
            place = common.index(key)
            del common[place : place + 2]
        assert cli.main(["unlearn", *common, *given]) == code
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith(f"hf-unlearn: error: {message}")
        assert not Path("out").exists()
