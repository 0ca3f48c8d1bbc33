"""Every architecture that is trained: what its denoiser is told and answers is what it is when the stock pipeline draws."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from image_data import weights
from text_to_image_data import denoiser_of, tiny, unet, vae
from vdu_data import prompted_arguments, seeded

from hf_unlearn import VDUTrainer
from hf_unlearn.images import of_latents, to_latents
from hf_unlearn.training.noise import FlowSchedule
from hf_unlearn.unlearning.diffusion.denoiser import as_pipeline
from hf_unlearn.unlearning.diffusion.drawing import generate
from hf_unlearn.unlearning.diffusion.encoded import encode_prompts
from hf_unlearn.unlearning.diffusion.pipelines import PIPELINES, architecture_of


PROMPTS = ["a photo of a cat", "an old horse"]
CLASSES = ["cat", "5"]


def lcm():
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = tiny("sd").components | {"unet": unet(cross_attention_dim=64, time_cond_proj_dim=8)}
    return LatentConsistencyModelPipeline(**(parts | {"scheduler": LCMScheduler()}), requires_safety_checker=False)


def large_pixart():
    """Told the size of the image, as the one of 1024 pixels is."""
    pipe = diffusers.PixArtAlphaPipeline(**tiny("pixart").components)
    config = dict(pipe.transformer.config) | {"sample_size": 128, "patch_size": 32, "use_additional_conditions": True}
    config |= {"attention_head_dim": 36, "cross_attention_dim": 72}  # divisible by three
    pipe.transformer = diffusers.PixArtTransformer2DModel.from_config(config).eval()
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return pipe


def flux_schnell():
    """Told no guidance; its scheduler shifts by the size of the image."""
    pipe = tiny("flux")
    config = dict(pipe.transformer.config) | {"guidance_embeds": False}
    pipe.transformer = diffusers.FluxTransformer2DModel.from_config(config).eval()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return pipe


MADE = {"lcm": lcm, "large pixart": large_pixart, "schnell": flux_schnell}
KINDS = ["sd", "lcm", "sdxl", "pixart", "large pixart", "sd3", "flux", "schnell", "dit"]


def made(kind):
    pipe = MADE[kind]() if kind in MADE else tiny(kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(kind):
    return CLASSES if kind == "dit" else PROMPTS


def drawn(pipe, kind, guidance, steps=1, seed=0):
    """By the stock pipeline's own call."""
    generators = [torch.Generator().manual_seed(seed + place) for place in range(2)]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
    if kind == "dit":
        return pipe(pipe.get_label_ids(["cat"]) + [5], output_type="np", **options).images
    if "pixart" in kind:
        options |= {"use_resolution_binning": False, "clean_caption": False}
    return pipe(PROMPTS, output_type="latent", **options).images


class Watched:
    """What a denoiser was told and answered, call by call."""

    def __init__(self, denoiser):
        import inspect

        self.calls = []
        self.names = list(inspect.signature(denoiser.forward).parameters)
        self.handle = denoiser.register_forward_hook(self.saw, with_kwargs=True)

    def saw(self, _, inputs, told, answer):
        told = dict(zip(self.names, inputs, strict=False)) | told
        told |= told.pop("added_cond_kwargs", None) or {}
        tensors = {name: value for name, value in told.items() if torch.is_tensor(value)}
        self.calls.append((tensors, answer[0] if isinstance(answer, tuple) else answer.sample))


def flat(noisy, pipe):
    """As latents are kept here."""
    return pipe._unpack_latents(noisy, 4, 4, 1) if noisy.dim() == 3 else noisy[:, :4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_told_and_answers_what_the_stock_pipeline_does(kind, dtype):
    """Guidance off, where it is computed; told, where it is told."""
    pipe = made(kind).to(dtype)
    pipe.vae.to(torch.float32)
    guidance = 3.0 if kind in ("lcm", "flux", "schnell") else 1.0
    watched = Watched(denoiser_of(pipe))
    if dtype == torch.bfloat16 and kind == "dit":
        pipe.vae.to(dtype)
    drawn(pipe, kind, guidance)
    (expected, answer), *rest = watched.calls
    assert not rest
    architecture = architecture_of(pipe)
    tables, rows = encode_prompts(asked(kind), pipe, device="cpu", guidance_scale=guidance)
    conditioning = {name: table[rows] for name, table in tables.items()}
    noisy = flat(expected["hidden_states" if "hidden_states" in expected else "sample"], pipe)
    times = expected["timestep"].expand(2)
    if kind in ("flux", "schnell"):
        times = times * 1000
    with torch.no_grad():
        mine = architecture.call(architecture.denoiser, noisy, times, conditioning)
    told = watched.calls[1][0]
    assert set(told) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(told[name].float(), value.expand_as(told[name]).float(), rtol=0, atol=0, msg=name)
    torch.testing.assert_close(mine, flat(answer, pipe), rtol=0, atol=0)
    assert len({value.shape[0] for value in conditioning.values()} | {2}) == 1


def test_long_prompts_are_told_of_in_one_line(caplog):
    """However many batches of them are encoded and drawn; the libraries would say it of each."""
    pipe = tiny("sd")
    prompts = [f"{'red ' * 20}{name}" for name in ("cat", "dog")] + ["a cat"]
    caplog.clear()
    encode_prompts(prompts, pipe, device="cpu")
    generate(pipe, prompts, num_inference_steps=1, batch_size=1)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["prompts: 2 of 3 have more than the encoder's 12 tokens; what stands behind is not read"]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "sd3", "dit"])
def test_without_a_prompt_it_is_told_what_guidance_tells_it(kind):
    """Which for SDXL are zeros."""
    pipe = made(kind)
    watched = Watched(denoiser_of(pipe))
    drawn(pipe, kind, 3.0)
    expected = watched.calls[0][0]
    half = slice(2, 4) if kind == "dit" else slice(0, 2)  # DiT has it behind
    tables, rows = encode_prompts(["", ""], pipe, device="cpu")
    told = architecture_of(pipe).unprompted({name: table[rows] for name, table in tables.items()})
    for name, value in told.items():
        torch.testing.assert_close(value, expected[name][half], rtol=1e-5, atol=1e-4)
    assert architecture_of(pipe).has_guidance


@pytest.mark.parametrize("kind", ["lcm", "sdxl", "pixart", "sd3", "flux", "dit", "controlnet"])
def test_draws_latents_and_their_images(kind):
    pipe = made(kind)
    architecture = architecture_of(pipe)
    latents, images = (generate(pipe, asked(kind), num_inference_steps=2, latents=given) for given in (True, False))
    assert latents.shape[1:] == architecture.latent_shape
    assert images.shape[1:] == architecture.resolution
    torch.testing.assert_close(of_latents(latents, pipe.vae, "cpu").clamp(-1, 1), images, rtol=0, atol=1e-5)
    if kind == "controlnet":  # without control
        plain = diffusers.StableDiffusionPipeline(
            **{name: part for name, part in pipe.components.items() if name != "controlnet"},
            requires_safety_checker=False,
        )
        torch.testing.assert_close(
            latents, generate(plain, PROMPTS, num_inference_steps=2, latents=True), rtol=0, atol=0
        )
    elif kind != "dit":
        torch.testing.assert_close(
            flat(drawn(pipe, kind, architecture.guidance_scale(), steps=2), pipe).shape, latents.shape
        )


class TestLatents:
    @pytest.mark.parametrize(
        "config", [{}, {"shift_factor": 0.1}, {"latents_mean": [0.5, -1, 2, 0.0], "latents_std": [2.0, 1, 0.5, 3]}]
    )
    def test_there_and_back(self, config):

        model = vae()
        model.register_to_config(scaling_factor=0.3, **config)
        images = torch.rand(2, 3, 8, 8, generator=seeded(0)) * 2 - 1
        with torch.no_grad():
            posterior = model.encode(images).latent_dist
            expected = model.decode(posterior.mean).sample
        mean, std = to_latents(images, model, "cpu")
        torch.testing.assert_close(of_latents(mean, model, "cpu"), expected, rtol=0, atol=1e-5)
        more = of_latents(mean + std, model, "cpu")
        with torch.no_grad():
            torch.testing.assert_close(more, model.decode(posterior.mean + posterior.std).sample, rtol=0, atol=1e-5)


class TestFlow:
    @pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}])  # fmt: skip
    def test_noises_what_the_scheduler_visits(self, config):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, **config)
        schedule = FlowSchedule.of(scheduler, tokens=1024)
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 50, 50), mu=calculate_shift(1024))
        steps = torch.arange(50)
        torch.testing.assert_close(schedule.times(steps), scheduler.timesteps.flip(0))
        clean, noise = torch.randn(2, 50, 3, 2, 2, generator=seeded(0))
        noisy = schedule.add_noise(clean, noise, steps)
        torch.testing.assert_close(noisy, scheduler.scale_noise(clean, scheduler.timesteps.flip(0), noise))
        assert (schedule.sigmas.diff() > 0).all()
        assert schedule.sigmas[-1] == 1

    def test_asks_for_the_velocity(self):
        """With which one step of the sampler is at the image; another image, by its shift."""
        schedule = FlowSchedule.of(FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=2.0))
        steps = torch.arange(20)
        clean, noise, change = torch.randn(3, 20, 3, 2, 2, generator=seeded(0))
        noisy, answer = schedule.add_noise(clean, noise, steps), schedule.target(clean, noise, steps)
        sigma = schedule.sigmas.view(-1, 1, 1, 1)
        torch.testing.assert_close(noisy - sigma * answer, clean, rtol=0, atol=1e-5)
        other = noisy - sigma * (answer + schedule.shift(change, steps))
        torch.testing.assert_close(other, clean + change, rtol=0, atol=1e-5)

    def test_weights(self):
        """Of the velocity as of the clean image, and the bound adds up to the whole fall of the signal."""
        schedule = FlowSchedule.of(FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=2.0))
        steps, error = torch.arange(20), 0.1
        sigma = schedule.sigmas
        ratio = ((1 - sigma) / sigma) ** 2
        of_x0 = (sigma * error) ** 2
        torch.testing.assert_close(schedule.weights(steps, "min_snr", 2.0) * error**2, ratio.clamp(max=2.0) * of_x0)
        assert (schedule.weights(steps, "simple") == 1).all()
        falls = schedule.weights(steps, "elbo") / sigma.square()
        torch.testing.assert_close(2 * falls[1:].sum(), ratio[0] - ratio[-1], rtol=1e-4, atol=0)
        assert (falls > 0).all()

    def test_other_schedulers_are_refused(self):
        for scheduler, match in (
            (DDIMScheduler(), "^noise_scheduler: DDIMScheduler matches no flow"),
            (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "^noise_scheduler: invert_sigmas"),
        ):
            with pytest.raises(ValueError, match=match):
                FlowSchedule.of(scheduler)


TRAINED = ["sdxl", "pixart", "sd3", "flux", "dit", "controlnet"]


def arguments(kind, folder, **values):
    plain = {"forget_samples": 4, "max_steps": 2, "learning_rate": 0.02}
    if kind == "dit":
        plain |= {"forget_prompts": ["cat"], "replay_prompts": ["horse", "7"]}
    else:
        plain |= {
            "forget_prompts": PROMPTS[:1],
            "redirect_prompt": "a photo of a horse",
            "replay_prompts": ["a dog", "a house"],
        }
    return prompted_arguments(folder, **(plain | values))


def reloaded(pipe, folder):
    loaded = type(pipe).from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    if hasattr(pipe, "default_sample_size"):
        loaded.default_sample_size = pipe.default_sample_size
    return loaded


class TestTraining:
    @pytest.mark.parametrize("kind", TRAINED)
    def test_redirects_is_saved_and_loads_in_the_stock_class(self, kind, tmp_path):
        pipe = made(kind)
        before = weights(denoiser_of(pipe))
        draw = {"num_inference_steps": 2, "seed": 3, "latents": True}
        drew = generate(pipe, asked(kind), **draw)
        trainer = VDUTrainer(
            pipeline=pipe,
            args=arguments(kind, tmp_path, trainable=["cross_attention"], guard=True, utility_tolerance=1e9),
        )
        trainer.train()
        trainer.save_model()
        assert trainer.state.log_history
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert changed
        allowed = {
            "pixart": ("attn2",), "controlnet": ("attn2",), "sdxl": ("attn2", "add_embedding"), "dit": ("class_embedder",),
        }.get(kind, ("context_embedder", "text_embedder", "add_k_proj", "add_v_proj"))  # fmt: skip
        assert all(any(part in name for part in allowed) for name in changed)
        for part in allowed:
            assert any(part in name for name in changed), part
        loaded = reloaded(pipe, tmp_path)
        assert set(loaded.components) == set(pipe.components)
        torch.testing.assert_close(weights(denoiser_of(loaded)), weights(trainer.model), rtol=0, atol=0)
        now = generate(loaded, asked(kind), **draw)
        torch.testing.assert_close(now, generate(trainer.pipeline, asked(kind), **draw), rtol=0, atol=1e-5)
        assert (now - drew).abs().max() > 1e-3
        assert np.isfinite(trainer.remaining_effect())

    @pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
    def test_a_lora_is_put_onto_the_original(self, kind, tmp_path):
        pipe = made(kind)
        draw = {"num_inference_steps": 2, "latents": True}
        trainer = VDUTrainer(
            pipeline=pipe,
            args=arguments(kind, tmp_path, trainable=["lora"], lora_rank=2, max_steps=1, merge_adapter=False),
        )
        trainer.train()
        trainer.save_model()
        original = made(kind)
        drew = generate(original, PROMPTS, **draw)
        original.load_lora_weights(tmp_path)
        now = generate(original, PROMPTS, **draw)
        torch.testing.assert_close(now, generate(trainer.pipeline, PROMPTS, **draw), rtol=0, atol=1e-4)
        assert (now - drew).abs().max() > 1e-3

    def test_no_lora_where_diffusers_has_none(self, tmp_path):
        with pytest.raises(ValueError, match="^trainable: PixArtTransformer2DModel takes no LoRA in diffusers"):
            VDUTrainer(pipeline=made("pixart"), args=arguments("pixart", tmp_path, trainable=["lora"]))

    def test_images_with_prompts(self, tmp_path):
        """Of a model that sees latents in packs."""
        from vdu_data import prompted_images

        trainer = VDUTrainer(
            pipeline=made("flux"),
            args=arguments("flux", tmp_path, forget_prompts=None, max_steps=1),
            forget_dataset=prompted_images(),
        )
        before = weights(trainer.model)
        trainer.train()
        assert any(not torch.equal(value, before[name]) for name, value in weights(trainer.model).items())


class TestClasses:
    def test_names_and_numbers(self):
        pipe = tiny("dit")
        told, rows = encode_prompts(["cat", "tabby", "5", ""], pipe, device="cpu")
        assert told["class_labels"][rows].tolist() == [3, 3, 5, 1000]
        for strange in ("dog", "1000", "-1"):
            with pytest.raises(ValueError, match=f"^prompt: {strange!r} is no class of this pipeline"):
                encode_prompts([strange], pipe, device="cpu")

    def test_no_label_is_dropped_while_it_is_trained(self):
        pipe, _ = as_pipeline(None, tiny("dit"), None)
        architecture = architecture_of(pipe)
        pipe.transformer.train()
        told = {"class_labels": torch.full((64,), 3)}
        noisy = architecture.noise(1, seeded(0)).expand(64, -1, -1, -1)
        answer = architecture.call(pipe.transformer, noisy, torch.full((64,), 5), told)
        torch.testing.assert_close(answer, answer[:1].expand_as(answer))

    def test_their_names_are_saved(self, tmp_path):
        pipe, _ = as_pipeline(None, tiny("dit"), None)
        pipe.save_pretrained(tmp_path)
        assert diffusers.DiTPipeline.from_pretrained(tmp_path).labels == pipe.labels

    def test_another_number_of_classes(self):
        pipe = tiny("dit")
        pipe.transformer.register_to_config(num_embeds_ada_norm=10)
        with pytest.raises(ValueError, match="^pipeline: its transformer knows 10 classes"):
            as_pipeline(None, pipe, None)


class TestRefusals:
    def test_by_name(self):
        for name in (
            "WanPipeline",
            "LTXPipeline",
            "HunyuanDiTPipeline",
            "Flux2Pipeline",
            "SanaPipeline",
            "StableDiffusionImg2ImgPipeline",
        ):
            assert name not in PIPELINES
            with pytest.raises(ValueError, match=f"^pipeline: {name} is not supported; pass a pipeline of one of "):
                as_pipeline(None, object.__new__(getattr(diffusers, name)), None)

    def test_fused_joint_projections(self):
        for kind in ("sd3", "flux"):
            pipe = tiny(kind)
            pipe.transformer.fuse_qkv_projections()
            with pytest.raises(ValueError, match="^pipeline: its projections are fused"):
                as_pipeline(None, pipe, None)

    def test_missing_parts(self):
        for kind, part in (("sd3", "text_encoder_2"), ("flux", "vae"), ("dit", "vae")):
            pipe = tiny(kind)
            pipe.register_modules(**{part: None})
            with pytest.raises(ValueError, match=f"^pipeline: .* has no {part}; load the pipeline with it"):
                as_pipeline(None, pipe, None)
