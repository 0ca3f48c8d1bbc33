"""Adapt-then-Unlearn: both stages against the paper's equations, what is kept private, and what a run leaves behind."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_unlearn import (
    AdaptThenUnlearnConfig,
    AdaptThenUnlearnTrainer,
    DCGANDiscriminator,
    DCGANGenerator,
    GANPipeline,
)
from hf_unlearn.hub.publish import check_publishable
from hf_unlearn.parameters.reference import ReferencePoint
from hf_unlearn.training.pictures import PULCallback


SMALL = {"sample_size": 8, "base_channels": 4}


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    return GANPipeline(DCGANGenerator(latent_dim=4, **SMALL), DCGANDiscriminator(**SMALL))


@pytest.fixture
def marked(pipeline):
    """Latents of 12 negatives and 20 positives."""
    latents = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return {"negatives": latents[:12], "positives": latents[12:]}


def config(folder, **settings):
    settings = {
        "max_steps": 4,
        "adapt_steps": 3,
        "per_device_train_batch_size": 8,
        "fisher_samples": 16,
        "own_samples": 64,
        "grid_images": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | settings
    return AdaptThenUnlearnConfig(str(folder), **settings)


def copied(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(first[name].equal(second[name]) for name in first)


class TestStageOne:
    def test_consolidation_is_the_paper_s(self, pipeline, marked, tmp_path):
        """λ Σ Fᵢ(θᵢ − θ_G,i)², F the mean square of the gradient of D(G(z)) for each z alone, scaled to a mean of one."""
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, consolidation_weight=0.3), **marked)
        trainer._remember_original(False)
        anchor = trainer.build_consolidation()
        generator = copy.deepcopy(pipeline.generator).requires_grad_(True)
        parameters = dict(generator.named_parameters())
        latents = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))  # any: another draw would differ
        seen = []

        def fisher_by_hand(latents):
            total = {name: torch.zeros_like(value) for name, value in parameters.items()}
            for z in latents:
                score = pipeline.discriminator(generator(z[None]).sample).logits.sum()
                for name, slope in zip(parameters, torch.autograd.grad(score, list(parameters.values())), strict=True):
                    total[name] += slope**2
            mean = sum(value.sum() for value in total.values()) / sum(value.numel() for value in total.values())
            return {name: value / mean for name, value in total.items()}

        from hf_unlearn.modes import seeded_generator
        from hf_unlearn.unlearning.gan.adapt_then_unlearn import FISHER_SEED

        latents = torch.randn(16, 4, generator=seeded_generator("cpu", trainer.args.seed, FISHER_SEED))
        fisher = fisher_by_hand(latents)
        with torch.no_grad():
            for value in parameters.values():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        expected = 0.3 * sum(
            (fisher[name] * (value - trainer.reference.parameters[name]) ** 2).sum()
            for name, value in parameters.items()
        )
        torch.testing.assert_close(anchor.value(parameters)["consolidation"], expected.detach(), rtol=1e-4, atol=1e-6)
        assert not seen

    def test_draws_toward_the_negatives(self, pipeline, tmp_path):
        """All negatives are white: the adapted model is lighter than the original, and the more it is held, the less."""
        white, black = torch.full((8, 1, 8, 8), 0.9), torch.full((8, 1, 8, 8), -0.9)

        def brightness(weight):
            args = config(
                tmp_path / str(weight),
                adapt_steps=60,
                adapt_learning_rate=2e-3,
                consolidation_weight=weight,
                own_samples=0,
            )
            trainer = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), args, negatives=white, positives=black)
            (adapted,) = trainer.adapt()
            assert same(copied(trainer.averaged), copied(pipeline.generator))  # stage 1 leaves the original alone
            ReferencePoint(adapted).restore(generator := copy.deepcopy(pipeline.generator).requires_grad_(True))
            return GANPipeline(generator).draw(torch.randn(64, 4, generator=torch.Generator().manual_seed(5))).mean()

        before = pipeline.draw(torch.randn(64, 4, generator=torch.Generator().manual_seed(5))).mean()
        free, held = brightness(0.0), brightness(100.0)
        assert free > before + 0.1
        assert before - 0.05 < held < before + 0.5 * (free - before)

    def test_models_are_independent_and_private(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, adapted_models=2), **marked)
        trainer.train()
        first, second = (load_file(tmp_path / "_private" / f"adapted-{k}.safetensors") for k in range(2))
        assert not same(first, second)
        for name, value in trainer.anchor.mean.items():
            mean = (first[f"parameter/{name}"] + second[f"parameter/{name}"]) / 2
            torch.testing.assert_close(value, mean)

    def test_not_done_without_repulsion(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, repulsion="none"), **marked)
        trainer.train()
        assert trainer.anchor is None
        assert not list(tmp_path.glob("_private/adapted*"))


class TestStageTwo:
    @pytest.mark.parametrize("kind", ["el2", "il2", "nl2"])
    def test_gradient_is_the_paper_s(self, pipeline, marked, tmp_path, kind):
        """The generator's gradient is that of L_adv + γ g(‖θ − θ_N‖²) by autograd, and the optimiser sees nothing else."""
        settings = {"repulsion": kind, "distance": "sum_squares", "repulsion_weight": 0.7, "repulsion_rate": 0.2}
        trainer = AdaptThenUnlearnTrainer(
            pipeline, config(tmp_path, max_steps=1, own_samples=0, r1_weight=0.0, **settings), **marked
        )
        trainer.adapt()
        seen = {}

        class Look(type(trainer.callback_handler.callbacks[0]).__mro__[1]):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                seen["gradient"] = {n: p.grad.clone() for n, p in trainer.model.generator.named_parameters()}
                seen["discriminator"] = copy.deepcopy(trainer.model.discriminator)
                seen["generator"] = copy.deepcopy(trainer.model.generator)

        trainer.add_callback(Look())
        trainer.train()
        generator, parameters = seen["generator"], dict(seen["generator"].named_parameters())
        drawn = generator(trainer._latents(8, 0, 1).detach()).sample
        distance = sum((value - trainer.adapted[0][name]).square().sum() for name, value in parameters.items())
        repulsion = {"el2": torch.exp(-0.2 * distance), "il2": 1 / distance, "nl2": -distance}[kind]
        loss = F.softplus(-seen["discriminator"](drawn).logits).mean() + 0.7 * repulsion
        expected = torch.autograd.grad(loss, list(parameters.values()))
        for gradient, wanted in zip(seen["gradient"].values(), expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)

    def test_negatives_are_shown_as_drawn(self, pipeline, marked, tmp_path):
        """A share of what the discriminator takes for drawn is negatives; the rest of the batch is drawn."""
        args = config(tmp_path, own_samples=0, repulsion="none", negative_share=0.25)
        trainer = AdaptThenUnlearnTrainer(pipeline, args, **marked)
        false = trainer.false_images(8, step=3)
        assert len(false) == 2
        known = trainer.feedback.negatives.flatten(1)
        assert all((image.flatten() == known).all(1).any() for image in false)
        assert trainer.false_images(8, step=3).equal(false)
        shown = []
        trainer.model.discriminator.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0].detach()))
        trainer.train()
        real, drawn = shown[:2]
        assert len(real) == len(drawn) == 8
        first = trainer.false_images(8, step=0)
        assert drawn[6:].equal(first)
        positives = trainer.feedback.positives.flatten(1)
        assert all((image.flatten() == positives).all(1).any() for image in real)

    def test_none_shown_for_a_share_of_zero(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, negative_share=0.0), **marked)
        assert trainer.false_images(64, step=0) is None

    def test_starts_from_the_original(self, pipeline, marked, tmp_path):
        """Stage 1 moves copies: without a learning rate, stage 2 ends where the pipeline began."""
        before = copied(pipeline.generator)
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, learning_rate=0.0), **marked)
        trainer.train()
        assert not same(
            before,
            {
                n.removeprefix("parameter/"): v
                for n, v in load_file(tmp_path / "_private/adapted-0.safetensors").items()
            },
        )
        for name, value in copied(trainer.pipeline.generator).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-7)

    def test_forgets_what_is_bright(self, tmp_path):
        """A generator that draws black and white images by the sign of z draws fewer white ones, and is still of black ones."""
        torch.manual_seed(0)
        pipeline = GANPipeline(DCGANGenerator(latent_dim=4, **SMALL), DCGANDiscriminator(**SMALL))
        optimizer = torch.optim.Adam(pipeline.generator.parameters(), 5e-3)
        for _ in range(150):
            z = torch.randn(64, 4)
            target = 0.8 * z[:, :1, None, None].sign().expand(-1, 1, 8, 8)
            loss = (pipeline.generator(z).sample - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        args = config(
            tmp_path, max_steps=150, adapt_steps=30, learning_rate=3e-3, ema_decay=0.9, mark_samples=300, guard=False,
            per_device_train_batch_size=32,
        )  # fmt: skip
        trainer = AdaptThenUnlearnTrainer(pipeline, args, marks=lambda images: images.mean((1, 2, 3)) > 0)
        before = (trainer.draw(200, 0).mean((1, 2, 3)) > 0).float().mean()
        trainer.train()
        after = (trainer.draw(200, 0).mean((1, 2, 3)) > 0).float().mean()
        assert 0.35 < before < 0.65
        assert after < 0.05
        with trainer.as_original():
            assert (trainer.draw(200, 0).mean((1, 2, 3)) > 0).float().mean() == before
        assert (trainer.draw(200, 0).mean((1, 2, 3)) > 0).float().mean() == after


class TestExtrapolation:
    def test_is_on_the_line(self, pipeline, marked, tmp_path):
        before = copied(pipeline.generator)
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **marked)
        moved = trainer.extrapolated(-0.5)
        for name, value in moved.generator.named_parameters():
            torch.testing.assert_close(
                value, 1.5 * before[name] - 0.5 * trainer.adapted[0][name], rtol=1e-4, atol=1e-6
            )
        assert same(copied(trainer.pipeline.generator), before)

    def test_not_after_a_run_without_stage_one(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, repulsion="none"), **marked)
        trainer.train()
        with pytest.raises(ValueError, match="before train"):
            trainer.extrapolated(-1)


class TestFeedback:
    def test_latents_and_their_images_are_the_same(self, pipeline, marked, tmp_path):
        states = []
        for name, given in (
            ("latents", marked),
            ("images", {key: pipeline.draw(value) for key, value in marked.items()}),
        ):
            trainer = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path / name), **given)
            trainer.train()
            states.append(copied(trainer.pipeline.generator))
        assert same(*states)

    def test_spread_over_own_samples(self, pipeline, marked, tmp_path):
        alone = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path, own_samples=0), **marked)
        spread = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path), **marked)
        assert len(alone.train_dataset) == 20
        assert len(alone.feedback.all_negatives) == 12
        assert len(spread.feedback.more_positives) + len(spread.feedback.more_negatives) <= 64
        assert len(spread.train_dataset) == 20 + len(spread.feedback.more_positives)

    def test_by_a_callable(self, pipeline, tmp_path):
        def dark(images):
            return images.mean((1, 2, 3)) < images.mean()

        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, mark_samples=50), marks=dark)
        assert len(trainer.feedback.negatives) + len(trainer.feedback.positives) == 50
        assert trainer.feedback.negatives.mean() < trainer.feedback.positives.mean()


class TestFreshDiscriminator:
    def test_only_by_choice(self, pipeline, marked, tmp_path):
        alone = GANPipeline(pipeline.generator)
        with pytest.raises(ValueError, match="discriminator='fresh'"):
            AdaptThenUnlearnTrainer(alone, config(tmp_path), **marked)
        assert not list(tmp_path.iterdir())

    def test_moves_alone_at_first(self, pipeline, marked, tmp_path):
        before = copied(pipeline.generator)
        args = config(tmp_path, discriminator="fresh", discriminator_warmup=4, repulsion="none")
        trainer = AdaptThenUnlearnTrainer(GANPipeline(pipeline.generator), args, **marked)
        fresh = copied(trainer.pipeline.discriminator)
        trainer.train()
        assert same(copied(trainer.model.generator), before)
        assert not same(copied(trainer.pipeline.discriminator), fresh)

    def test_has_steps_of_its_own_by_default(self, tmp_path):
        assert config(tmp_path, discriminator="fresh", adapt_steps=300).discriminator_warmup == 200
        assert config(tmp_path).discriminator_warmup == 0


class TestSaving:
    def test_nothing_private_is_published(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, grid_images=4), **marked)
        trainer.train()
        trainer.save_model()
        assert check_publishable(tmp_path) == [
            "README.md",
            "generator/config.json",
            "generator/diffusion_pytorch_model.safetensors",
            "model_index.json",
            "pictures/after.png",
        ]
        assert GANPipeline.from_pretrained(tmp_path).discriminator is None
        private = {path.name for path in (tmp_path / "_private").iterdir()}
        assert {"reference.safetensors", "adapted-0.safetensors", "discriminator", "samples"} <= private

    def test_discriminator_by_choice(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, save_discriminator=True), **marked)
        trainer.train()
        trainer.save_model()
        saved = GANPipeline.from_pretrained(tmp_path)
        assert same(copied(saved.discriminator), copied(trainer.pipeline.discriminator))

    def test_draws_the_same_in_a_new_process(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **marked)
        trainer.train()
        trainer.save_model()
        code = (
            "import sys, torch; from hf_unlearn import GANPipeline; pipe = GANPipeline.from_pretrained(sys.argv[1]); "
            "print(pipe.draw(torch.ones(1, 4)).flatten().tolist())"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        drawn = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
        torch.testing.assert_close(drawn, trainer.pipeline.draw(torch.ones(1, 4)).flatten(), rtol=0, atol=1e-6)

    def test_card(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **marked)
        trainer.train()
        card = trainer.model_card("me/without")
        assert "what 12 marked samples show" in card.text
        assert "from hf_unlearn import GANPipeline" in card.text
        assert card.data.library_name == "hf_unlearn"
        assert "| `repulsion_weight` |" in card.text

    def test_no_path_of_this_machine(self, pipeline, marked, tmp_path):
        """diffusers writes where a model came from."""
        pipeline.save_pretrained(tmp_path / "somebody-s-secret-folder")
        again = GANPipeline.from_pretrained(tmp_path / "somebody-s-secret-folder")
        trainer = AdaptThenUnlearnTrainer(again, config(tmp_path / "out"), **marked)
        trainer.train()
        trainer.save_model()
        texts = [path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md")]
        assert len(texts) >= 3
        assert not any("secret" in text for text in texts)

    def test_card_lies_beside_the_model(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path / "out"), **marked)
        trainer.train()
        trainer.save_model(str(tmp_path / "elsewhere"))
        assert (tmp_path / "elsewhere" / "README.md").is_file()
        assert not (tmp_path / "out" / "README.md").exists()

    def test_pictures_of_an_earlier_run_go(self, pipeline, marked, tmp_path):
        for publish in (True, False):
            args = config(tmp_path, grid_images=4, publish_before=publish)
            trainer = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), args, **marked)
            trainer.train()
            assert (tmp_path / "pictures" / "before.png").exists() == publish

    def test_going_back_to_the_original_is_told(self, pipeline, marked, tmp_path):
        from hf_unlearn.gan.collapse import Coverage

        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **marked)
        trainer.train()
        trainer.guard.collapsed, trainer.guard.healthy = Coverage(3, 0.02), 0
        assert trainer.failed_checks[1:] == ["Nothing was unlearned: what is kept is the original."]

    def test_collapse_is_told(self, pipeline, marked, tmp_path):
        from hf_unlearn.gan.collapse import Coverage

        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **marked)
        trainer.train()
        assert trainer.failed_checks == []
        trainer.guard.collapsed, trainer.guard.healthy = Coverage(3, 0.02), 2
        assert trainer.failed_checks == ["Mode collapse at step 3: 2 % coverage; kept is step 2."]
        assert trainer.provenance().steps == 2


class TestResume:
    def test_ends_where_an_unbroken_run_does(self, pipeline, marked, tmp_path):
        """Stage 1 is read, not repeated; the original is known from disk."""
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        whole = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path / "whole", **settings), **marked)
        whole.train()
        torch.manual_seed(99)
        broken = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path / "whole", **settings), **marked)
        adapted = (tmp_path / "whole/_private/adapted-0.safetensors").stat().st_mtime_ns
        broken.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
        assert same(copied(broken.pipeline.generator), copied(whole.pipeline.generator))
        assert same(copied(broken.model), copied(whole.model))
        assert (tmp_path / "whole/_private/adapted-0.safetensors").stat().st_mtime_ns == adapted
        with broken.as_original():
            assert same(copied(broken.averaged), copied(pipeline.generator))

    @pytest.mark.parametrize("other", ["feedback", "settings"])
    def test_refused_with_other_feedback_or_another_stage_one(self, pipeline, marked, tmp_path, other):
        settings = {"save_strategy": "steps", "save_steps": 2}
        AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path, **settings), **marked).train()
        if other == "feedback":
            marked = {"negatives": marked["negatives"][:7], "positives": marked["positives"]}
        else:
            settings |= {"adapted_models": 2}
        again = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path, **settings), **marked)
        with pytest.raises(ValueError, match="had other feedback or another stage 1"):
            again.train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("file", ["adapted-0.safetensors", "reference.safetensors"])
    def test_refused_without_what_it_needs(self, pipeline, marked, tmp_path, file):
        settings = {"save_strategy": "steps", "save_steps": 2}
        AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path, **settings), **marked).train()
        (tmp_path / "_private" / file).unlink()
        again = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), config(tmp_path, **settings), **marked)
        with pytest.raises(ValueError, match=file):
            again.train(resume_from_checkpoint=True)


class TestPUL:
    def test_is_logged(self, pipeline, marked, tmp_path):
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **marked)
        trainer.add_callback(PULCallback(trainer, lambda images: torch.arange(len(images)) % 2, [1], samples=10))
        trainer.train()
        assert [row["pul"] for row in trainer.state.log_history if "pul" in row] == [0.0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"negatives": None}, "negatives: missing or empty"),
            ({"negatives": torch.zeros(0, 4)}, "negatives: missing or empty"),
            ({"positives": None}, "positives: missing or empty"),
            ({"positives": torch.zeros(3, 1, 9, 9)}, "positives: an image has shape"),
            ({"negatives": torch.zeros(3, 3, 8, 8)}, "negatives: an image has shape"),
            ({"negatives": torch.full((3, 1, 8, 8), float("nan"))}, "negatives: an image holds NaN"),
            ({"marks": lambda images: images > 0}, "marks: given beside"),
            ({"train_dataset": torch.zeros(3, 1, 8, 8)}, "train_dataset: this trainer needs none"),
        ],
    )
    def test_arguments(self, pipeline, marked, tmp_path, given, message):
        before = copied(pipeline.generator)
        with pytest.raises(ValueError, match=message) as raised:
            AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **(marked | given))
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.iterdir())
        assert same(copied(pipeline.generator), before)

    @pytest.mark.parametrize(
        "settings",
        [
            {"repulsion": "l2"},
            {"distance": "cosine"},
            {"discriminator": "none"},
            {"adapted_models": 0},
            {"adapt_steps": 0},
            {"consolidation_weight": -1.0},
            {"repulsion_rate": 0.0},
            {"repulsion_weight": -1.0},
            {"negative_share": 1.0},
            {"miss_rate": 0.0},
            {"max_steps": -1},
            {"gradient_accumulation_steps": 2},
            {"fisher_samples": 0},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings(self, tmp_path, settings):
        with pytest.raises(ValueError, match=next(iter(settings))) as raised:
            config(tmp_path, **settings)
        assert "\n" not in str(raised.value)

    def test_sizes_that_do_not_match(self, pipeline, marked, tmp_path):
        other = GANPipeline(pipeline.generator, DCGANDiscriminator(sample_size=9, base_channels=4))
        with pytest.raises(ValueError, match="sample_size is 8, the discriminator's 9"):
            AdaptThenUnlearnTrainer(other, config(tmp_path), **marked)

    @pytest.mark.parametrize("given", [str, GANPipeline.from_pretrained], ids=["path", "pipeline"])
    def test_own_folder(self, pipeline, marked, tmp_path, given):
        pipeline.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds the original model"):
            AdaptThenUnlearnTrainer(given(tmp_path), config(tmp_path), **marked)

    def test_weights_in_16_bits(self, pipeline, marked, tmp_path):
        with pytest.raises(ValueError, match="weights are torch.bfloat16"):
            AdaptThenUnlearnTrainer(pipeline.to(torch.bfloat16), config(tmp_path), **marked)

    def test_fresh_beside_its_own(self, pipeline, marked, tmp_path):
        args = config(tmp_path, discriminator="fresh", discriminator_warmup=1)
        with pytest.raises(ValueError, match="discriminator='fresh': the pipeline has one"):
            AdaptThenUnlearnTrainer(pipeline, args, **marked)

    @pytest.mark.parametrize("given", [None, "nowhere", torch.nn.Linear(1, 1)], ids=["none", "no-folder", "module"])
    def test_no_pipeline(self, marked, tmp_path, given):
        with pytest.raises(ValueError, match="model"):
            AdaptThenUnlearnTrainer(given, config(tmp_path / "out"), **marked)


class TestPaperPreset:
    def test_has_nothing_of_ours(self, tmp_path):
        args = AdaptThenUnlearnConfig.paper(str(tmp_path))
        assert (args.negative_share, args.own_samples, args.guard, args.distance) == (0.0, 0, False, "mean_mse")

    def test_runs(self, pipeline, marked, tmp_path):
        args = AdaptThenUnlearnConfig.paper(
            str(tmp_path), max_steps=2, adapt_steps=2, fisher_samples=4, report_to="none", disable_tqdm=True,
            per_device_train_batch_size=4, use_cpu=True, dataloader_pin_memory=False, grid_images=0,
        )  # fmt: skip
        trainer = AdaptThenUnlearnTrainer(pipeline, args, **marked)
        trainer.train()
        assert trainer.state.global_step == 2
        assert len(trainer.train_dataset) == len(marked["positives"])
