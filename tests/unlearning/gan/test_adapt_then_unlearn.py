"""Adapt-then-Unlearn: both stages against the paper's equations, what is kept private, and what a run leaves behind."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from same_weights import same, same_run, weights
from transformers import TrainerCallback

from hf_unlearn import (
    AdaptThenUnlearnConfig,
    AdaptThenUnlearnTrainer,
    DCGANDiscriminator,
    DCGANGenerator,
    GANPipeline,
)
from hf_unlearn.gan.collapse import Coverage
from hf_unlearn.hub.publish import check_publishable
from hf_unlearn.modes import seeded_generator
from hf_unlearn.parameters.reference import ReferencePoint
from hf_unlearn.training.pictures import PULCallback
from hf_unlearn.unlearning.gan.adapt_then_unlearn import FISHER_SEED
from hf_unlearn.unlearning.gan.outcome import JUDGE_SEED, JUDGED, Drawn


SMALL = {"sample_size": 8, "base_channels": 4}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2, "adapted_models": 2}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_pipeline():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GANPipeline(DCGANGenerator(latent_dim=4, **SMALL), DCGANDiscriminator(**SMALL))


@pytest.fixture
def pipeline():
    return new_pipeline()


@pytest.fixture
def marked():
    """Latents of 12 undesired and 20 clean."""
    return dict(zip(("undesired", "clean"), noise(32, 4, seed=1).split([12, 20]), strict=True))


def config(folder, **settings):
    settings = {
        "max_steps": 4, "adapt_steps": 3, "per_device_train_batch_size": 8, "fisher_samples": 16, "own_samples": 64,
        "grid_images": 0, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True,
        "dataloader_pin_memory": False,
    } | settings  # fmt: skip
    return AdaptThenUnlearnConfig(str(folder), **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has ended and is saved, of a pipeline that was loaded: to be read, or copied, but not changed."""
    folder = tmp_path_factory.mktemp("finished")
    new_pipeline().save_pretrained(folder / "somebody-s-secret-folder")
    loaded = GANPipeline.from_pretrained(folder / "somebody-s-secret-folder")
    undesired, clean = noise(32, 4, seed=1).split([12, 20])
    args = config(folder / "out", grid_images=4, **CHECKPOINTS)
    trainer = AdaptThenUnlearnTrainer(loaded, args, undesired=undesired, clean=clean)
    trainer.add_callback(PULCallback(trainer, lambda images: torch.arange(len(images)) % 2, [1], samples=10))
    trainer.train()
    trainer.save_model()
    return SimpleNamespace(trainer=trainer, out=folder / "out")


class TestStageOne:
    def test_consolidation_is_the_paper_s(self, pipeline, marked, tmp_path):
        """λ Σ Fᵢ(θᵢ − θ_G,i)², F the mean square of the gradient of D(G(z)) for each z alone, scaled to a mean of one."""
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, consolidation_weight=0.3), **marked)
        trainer._remember_original(False)
        anchor = trainer.build_consolidation()
        generator = copy.deepcopy(pipeline.generator).requires_grad_(True)
        parameters = dict(generator.named_parameters())
        fisher = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for z in torch.randn(16, 4, generator=seeded_generator("cpu", trainer.args.seed, FISHER_SEED)):
            score = pipeline.discriminator(generator(z[None]).sample).logits.sum()
            for name, slope in zip(parameters, torch.autograd.grad(score, list(parameters.values())), strict=True):
                fisher[name] += slope**2
        mean = sum(value.sum() for value in fisher.values()) / sum(value.numel() for value in fisher.values())
        with torch.no_grad():
            for value in parameters.values():
                value.add_(noise(*value.shape, seed=2) * 0.1)
        moved = {name: (value - trainer.reference.parameters[name]) ** 2 for name, value in parameters.items()}
        expected = 0.3 * sum((fisher[name] / mean * moved[name]).sum() for name in moved)
        torch.testing.assert_close(anchor.value(parameters)["consolidation"], expected.detach(), rtol=1e-4, atol=1e-6)

    def test_draws_toward_the_negatives(self, pipeline, tmp_path):
        """All undesired are white: the adapted model is lighter than the original, and the more it is held, the less."""
        white, black = torch.full((8, 1, 8, 8), 0.9), torch.full((8, 1, 8, 8), -0.9)

        def brightness(weight):
            args = config(
                tmp_path,
                adapt_steps=60,
                adapt_learning_rate=2e-3,
                consolidation_weight=weight,
                own_samples=0,
                logging_strategy="no",
            )
            trainer = AdaptThenUnlearnTrainer(copy.deepcopy(pipeline), args, undesired=white, clean=black)
            (adapted,) = trainer.adapt()
            assert same(weights(trainer.averaged), weights(pipeline.generator))  # stage 1 leaves the original alone
            ReferencePoint(adapted).restore(generator := copy.deepcopy(pipeline.generator).requires_grad_(True))
            return GANPipeline(generator).draw(noise(64, 4, seed=5)).mean()

        before = pipeline.draw(noise(64, 4, seed=5)).mean()
        free, held = brightness(0.0), brightness(100.0)
        assert free > before + 0.5  # −0.24 and 0.96
        assert before < held < before + 0.5 * (free - before)  # −0.02

    def test_models_are_independent_and_private(self, finished):
        first, second = (load_file(finished.out / "_private" / f"adapted-{k}.safetensors") for k in range(2))
        for name, value in finished.trainer.anchor.mean.items():
            one, other = first[f"parameter/{name}"], second[f"parameter/{name}"]
            assert not one.equal(other)
            torch.testing.assert_close(value, (one + other) / 2)


class TestStageTwo:
    @pytest.mark.parametrize("kind", ["el2", "il2", "nl2"])
    def test_gradient_is_the_paper_s(self, pipeline, marked, tmp_path, kind):
        """The generator's gradient is that of L_adv + γ g(‖θ − θ_N‖²) by autograd, and the optimiser sees nothing else."""
        settings = {"repulsion": kind, "distance": "sum_squares", "repulsion_weight": 0.7, "repulsion_rate": 0.2}
        args = config(tmp_path, max_steps=1, own_samples=0, r1_weight=0.0, **settings)
        trainer = AdaptThenUnlearnTrainer(pipeline, args, **marked)
        trainer.adapt()
        seen = []

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                seen.append({n: p.grad.clone() for n, p in trainer.model.generator.named_parameters()})
                seen.append(copy.deepcopy(trainer.model))

        trainer.add_callback(Look())
        trainer.train()
        gradients, model = seen
        parameters = dict(model.generator.named_parameters())
        drawn = model.generator(trainer._latents(8, 0, 1).detach()).sample
        distance = sum((value - trainer.adapted[0][name]).square().sum() for name, value in parameters.items())
        repulsion = {"el2": torch.exp(-0.2 * distance), "il2": 1 / distance, "nl2": -distance}[kind]
        loss = F.softplus(-model.discriminator(drawn).logits).mean() + 0.7 * repulsion
        expected = torch.autograd.grad(loss, list(parameters.values()))
        for gradient, wanted in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)

    def test_negatives_are_shown_as_drawn(self, pipeline, marked, tmp_path):
        """A share of what the discriminator takes for drawn is undesired; the rest of the batch is drawn."""
        args = config(tmp_path, max_steps=1, own_samples=0, repulsion="none", negative_share=0.25)
        trainer = AdaptThenUnlearnTrainer(pipeline, args, **marked)
        false = trainer.false_images(8, step=3)
        assert len(false) == 2
        known, clean = (images.flatten(1) for images in (trainer.feedback.undesired, trainer.feedback.clean))
        assert all((image.flatten() == known).all(1).any() for image in false)
        assert trainer.false_images(8, step=3).equal(false)
        shown = []
        trainer.model.discriminator.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0].detach()))
        trainer.train()
        real, drawn = shown[:2]
        assert len(real) == len(drawn) == 8
        assert drawn[6:].equal(trainer.false_images(8, step=0))
        assert not any((image.flatten() == known).all(1).any() for image in drawn[:6])
        assert all((image.flatten() == clean).all(1).any() for image in real)
        trainer.args.negative_share = 0.0
        assert trainer.false_images(64, step=0) is None

    def test_starts_from_the_original(self, pipeline, marked, tmp_path):
        """Stage 1 moves copies: without a learning rate, stage 2 ends where the pipeline began."""
        before = weights(pipeline.generator)
        trainer = AdaptThenUnlearnTrainer(pipeline, config(tmp_path, learning_rate=0.0), **marked)
        trainer.train()
        adapted = load_file(tmp_path / "_private/adapted-0.safetensors")
        for name, value in trainer.pipeline.generator.named_parameters():
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)  # an average of equals
            assert not adapted[f"parameter/{name}"].equal(before[name])

    def test_forgets_what_is_bright(self, pipeline, tmp_path):
        """A generator that draws black and white images by the sign of z draws fewer white ones, and is still of black ones."""
        optimizer = torch.optim.Adam(pipeline.generator.parameters(), 5e-3)
        for step in range(150):
            z = noise(64, 4, seed=step)
            target = 0.8 * z[:, :1, None, None].sign().expand(-1, 1, 8, 8)
            loss = (pipeline.generator(z).sample - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        args = config(
            tmp_path, max_steps=150, adapt_steps=30, learning_rate=3e-3, ema_decay=0.9, mark_samples=300, guard=False,
            per_device_train_batch_size=32, logging_strategy="no",
        )  # fmt: skip
        trainer = AdaptThenUnlearnTrainer(pipeline, args, marker=lambda images: images.mean((1, 2, 3)) > 0)

        def white():
            return (trainer.draw(200, 0).mean((1, 2, 3)) > 0).float().mean().item()

        assert len(trainer.feedback.undesired) + len(trainer.feedback.clean) == 300
        before = white()
        trainer.train()
        after = white()
        assert 0.35 < before < 0.65
        assert after < 0.05
        with trainer.as_original():
            assert white() == pytest.approx(before, abs=0.02)
        assert white() == pytest.approx(after, abs=0.02)


def test_extrapolation_is_on_the_line(finished):
    before, now = weights(new_pipeline().generator), weights(finished.trainer.pipeline.generator)
    moved = finished.trainer.extrapolated(-0.5)
    for name, value in moved.generator.named_parameters():
        expected = 1.5 * before[name] - 0.5 * finished.trainer.adapted[0][name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    assert same(weights(finished.trainer.pipeline.generator), now)


class TestFeedback:
    def test_latents_and_their_images_are_the_same(self, pipeline, marked, tmp_path):
        images = {key: pipeline.draw(value) for key, value in marked.items()}
        one, other = (
            AdaptThenUnlearnTrainer(new_pipeline(), config(tmp_path), **x).feedback for x in (marked, images)
        )
        for name in ("undesired", "clean", "more_undesired", "more_clean"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))

    def test_spread_over_own_samples(self, marked, tmp_path):
        alone, spread = (
            AdaptThenUnlearnTrainer(new_pipeline(), config(tmp_path, own_samples=n), **marked) for n in (0, 64)
        )
        assert (len(alone.train_dataset), len(alone.feedback.all_undesired)) == (20, 12)
        more = len(spread.feedback.more_clean)
        assert 0 < more <= 64 - len(spread.feedback.more_undesired)
        assert len(spread.train_dataset) == 20 + more


def test_a_fresh_discriminator_comes_by_choice_and_moves_alone_at_first(pipeline, marked, tmp_path):
    alone, before = GANPipeline(pipeline.generator), weights(pipeline.generator)
    with pytest.raises(ValueError, match="discriminator='fresh'"):
        AdaptThenUnlearnTrainer(alone, config(tmp_path), **marked)
    assert not list(tmp_path.iterdir())
    args = config(tmp_path, discriminator="fresh", discriminator_warmup=4, repulsion="none")
    trainer = AdaptThenUnlearnTrainer(alone, args, **marked)
    fresh = weights(trainer.pipeline.discriminator)
    trainer.train()
    assert same(weights(trainer.model.generator), before)
    assert not same(weights(trainer.pipeline.discriminator), fresh)
    # Without repulsion no model is adapted.
    assert trainer.anchor is None
    assert not list(tmp_path.glob("_private/adapted*"))
    with pytest.raises(ValueError, match="before train"):
        trainer.extrapolated(-1)
    with pytest.raises(ValueError, match="discriminator='fresh': the pipeline has one"):
        AdaptThenUnlearnTrainer(new_pipeline(), args, **marked)
    # It has steps of its own by default.
    assert config(tmp_path, discriminator="fresh", adapt_steps=300).discriminator_warmup == 200
    assert config(tmp_path).discriminator_warmup == 0


class TestSaving:
    def test_nothing_private_is_published(self, finished):
        assert check_publishable(finished.out) == [
            "README.md",
            "generator/config.json",
            "generator/diffusion_pytorch_model.safetensors",
            "model_index.json",
            "pictures/after.png",
            "provenance.json",
        ]
        assert GANPipeline.from_pretrained(finished.out).discriminator is None
        private = {path.name for path in (finished.out / "_private").iterdir()}
        assert {"reference.safetensors", "adapted-0.safetensors", "discriminator", "samples"} <= private
        assert [row["pul"] for row in finished.trainer.state.log_history if "pul" in row] == [0.0]
        logged = [row["repulsion"] for row in finished.trainer.state.log_history if "repulsion" in row]
        now = finished.trainer.anchor.value(dict(finished.trainer.model.generator.named_parameters()))
        assert (len(logged), logged[-1]) == (4, pytest.approx(now["repulsion"].item(), rel=1e-4))
        texts = [path.read_text() for path in finished.out.rglob("*") if path.suffix in (".json", ".md")]
        assert len(texts) >= 4
        assert not any("secret" in text for text in texts)  # diffusers writes where a model came from

    def test_elsewhere_with_its_card_and_the_discriminator_by_choice(self, finished, monkeypatch, tmp_path):
        card = (finished.out / "README.md").stat().st_mtime_ns
        monkeypatch.setattr(finished.trainer.args, "save_discriminator", True)
        finished.trainer.save_model(str(tmp_path / "elsewhere"))
        assert (finished.out / "README.md").stat().st_mtime_ns == card
        text = (tmp_path / "elsewhere" / "README.md").read_text()
        assert "what 12 marked samples show" in text
        assert "from hf_unlearn import GANPipeline" in text
        assert "library_name: hf_unlearn" in text
        assert "| `repulsion_weight` | 0.1 |" in text
        saved = GANPipeline.from_pretrained(tmp_path / "elsewhere")
        assert same(weights(saved.generator), weights(finished.trainer.pipeline.generator))
        assert same(weights(saved.discriminator), weights(finished.trainer.pipeline.discriminator))

    def test_pictures_of_an_earlier_run_go(self, marked, tmp_path):
        for publish in (True, False):
            args = config(tmp_path, max_steps=1, repulsion="none", grid_images=4, publish_before=publish)
            AdaptThenUnlearnTrainer(new_pipeline(), args, **marked).train()
            assert (tmp_path / "pictures" / "before.png").exists() == publish

    def test_collapse_is_told(self, finished, monkeypatch):
        trainer = finished.trainer
        monkeypatch.setattr(trainer, "outcome", Drawn(0.2, 0.1))
        assert trainer.failed_checks == []
        assert trainer.provenance().steps == 4
        monkeypatch.setattr(trainer.guard, "collapsed", Coverage(3, 0.02))
        for healthy, checks, steps in [
            (2, ["Mode collapse at step 3: 2 % coverage; kept is step 2."], 2),
            (0, ["Mode collapse at step 3: 2 % coverage; kept is step 0.", "Nothing was unlearned: what is kept is the original."], 0),
            (None, ["Mode collapse at step 3: 2 % coverage; no state before it was healthy."], 4),
        ]:  # fmt: skip
            monkeypatch.setattr(trainer.guard, "healthy", healthy)
            assert trainer.failed_checks == checks
            assert trainer.provenance().steps == steps

    def test_what_is_left_is_counted_and_told(self, pipeline, tmp_path, capsys, caplog):
        """By the marker on samples from the same latents, of the original and of what is kept; in log, line and card."""
        undesired = lambda images: images.mean((1, 2, 3)) > images.mean()  # noqa: E731
        original = copy.deepcopy(pipeline)
        args = config(tmp_path, max_steps=1, repulsion="none", mark_samples=64, learning_rate=1e-6, ema_decay=0.9)
        trainer = AdaptThenUnlearnTrainer(pipeline, args, marker=lambda images: images.mean((1, 2, 3)) > -0.1)
        trainer.marker = undesired
        trainer.train()
        latents = torch.randn(JUDGED, 4, generator=seeded_generator("cpu", args.seed, JUDGE_SEED))
        drawn = torch.cat([each.draw(latents) for each in (original, trainer.pipeline)])
        before, after = undesired(drawn).view(2, -1).double().mean(1).tolist()
        assert (trainer.outcome.before, trainer.outcome.after) == pytest.approx((before, after), abs=2 / JUDGED)
        (failed,) = trainer.failed_checks
        assert failed.startswith("What was to be forgotten is still drawn: ")
        assert f"not passed: {failed}" in [record.getMessage() for record in caplog.records]
        assert (
            f"AdaptThenUnlearnTrainer, 1 steps: {100 * trainer.outcome.after:.1f} % of the samples"
            in capsys.readouterr().out
        )
        card = trainer.model_card(tmp_path).content
        assert failed in card
        assert f"| {100 * trainer.outcome.before:.2f} % | {100 * trainer.outcome.after:.2f} % |" in card


class TestResume:
    @pytest.fixture
    def again(self, finished, tmp_path):
        """A trainer of the same settings and feedback, or others, in a copy of the finished run's folder."""
        shutil.copytree(finished.out, tmp_path / "again")

        def again(settings=None, **feedback):
            args = config(tmp_path / "again", **(CHECKPOINTS | (settings or {})))
            return AdaptThenUnlearnTrainer(new_pipeline(), args, **feedback)

        return again

    def test_ends_where_an_unbroken_run_does(self, finished, again, marked, tmp_path):
        """Stage 1 is read, not repeated; so is the original."""
        adapted = [tmp_path / "again/_private" / f"adapted-{k}.safetensors" for k in range(2)]
        before = [file.stat().st_mtime_ns for file in adapted]
        torch.manual_seed(99)
        trainer = again(**marked)
        trainer.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-2"))
        assert same_run(weights(trainer.pipeline.generator), weights(finished.trainer.pipeline.generator))
        assert same_run(weights(trainer.model), weights(finished.trainer.model))
        assert [file.stat().st_mtime_ns for file in adapted] == before
        with trainer.as_original():
            assert same(weights(trainer.averaged), weights(new_pipeline().generator))


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"undesired": None}, "undesired: missing or empty"),
            ({"clean": torch.zeros(3, 1, 9, 9)}, "clean: an image has shape"),
            ({"marker": lambda images: images > 0}, "marker: given beside"),
            ({"train_dataset": torch.zeros(3, 1, 8, 8)}, "train_dataset: this trainer needs none"),
        ],
    )
    def test_arguments(self, pipeline, marked, tmp_path, given, message):
        before = weights(pipeline.generator)
        with pytest.raises(ValueError, match=message) as raised:
            AdaptThenUnlearnTrainer(pipeline, config(tmp_path), **(marked | given))
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.iterdir())
        assert same(weights(pipeline.generator), before)

    @pytest.mark.parametrize(
        "settings",
        [
            {"repulsion": "l2"}, {"distance": "cosine"}, {"discriminator": "none"}, {"adapted_models": 0}, {"adapt_steps": 0},
            {"mark_samples": 0}, {"grid_steps": 0}, {"own_samples": -1}, {"adapt_learning_rate": 0.0},
            {"consolidation_weight": -1.0}, {"repulsion_rate": 0.0}, {"repulsion_weight": -1.0}, {"negative_share": 1.0},
            {"miss_rate": 0.0}, {"max_steps": -1}, {"gradient_accumulation_steps": 2}, {"fisher_samples": 0},
            {"adapt_steps": 200, "discriminator": "fresh"},
        ],
        ids=lambda settings: next(iter(settings)),
    )  # fmt: skip
    def test_settings(self, tmp_path, settings):
        with pytest.raises(ValueError, match="^" + next(iter(settings))) as raised:
            config(tmp_path, **settings)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda _: GANPipeline(new_pipeline().generator, DCGANDiscriminator(9)), "sample_size is 8, the discriminator's 9"),
            (lambda folder: str(folder), "holds the original model"),
            (GANPipeline.from_pretrained, "holds the original model"),
            (lambda _: new_pipeline().to(torch.bfloat16), "weights are torch.bfloat16"),
            (lambda _: None, "^model: NoneType is no GANPipeline"),
            (lambda _: "nowhere", "^model='nowhere': neither a folder"),
        ],
        ids=["sizes", "own folder", "own pipeline", "16 bits", "none", "nowhere"],
    )  # fmt: skip
    def test_models(self, marked, tmp_path, make, message):
        new_pipeline().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            AdaptThenUnlearnTrainer(make(tmp_path), config(tmp_path), **marked)


def test_paper_preset_has_nothing_of_ours(tmp_path):
    args = AdaptThenUnlearnConfig.paper(str(tmp_path), use_cpu=True, max_steps=2)
    chosen = (args.negative_share, args.own_samples, args.guard, args.distance, args.lr_scheduler_type, args.max_steps)
    assert chosen == (0.0, 0, False, "mean_mse", "constant", 2)
