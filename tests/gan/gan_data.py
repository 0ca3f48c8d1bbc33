"""What the tests of GANs share: tiny players, images, arguments, and the training loop written out in plain PyTorch."""

import copy

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from same_weights import same, same_run, weights  # noqa: F401
from torch import nn
from transformers import TrainerCallback

from hf_unlearn import DCGANDiscriminator, DCGANGenerator, GANConfig, GANPipeline, GANTrainer
from hf_unlearn.gan.dcgan import GeneratorOutput
from hf_unlearn.modes import seeded_generator


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pipeline(*, seed=0, channels=1, latent_dim=4, dtype=torch.float32, norm="pixel", size=8):
    """Two tiny players with the same weights at every call; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = DCGANGenerator(size, channels, latent_dim=latent_dim, base_channels=4, norm=norm)
        return GANPipeline(generator.to(dtype), DCGANDiscriminator(size, channels, base_channels=4).to(dtype))


def images(n=12, *, seed=0, channels=1, size=8):
    """`n` bright images in [−1, 1], which an untrained model does not draw."""
    generator = torch.Generator().manual_seed(seed)
    bright = 1 - 0.5 * torch.rand(n, channels, size, size, generator=generator)
    bright[..., 0, 0] = -0.1  # or they might be in [0, 1]
    return bright


def own_images(pipe, n=64, *, seed=3):
    """What the pipeline draws itself: a data set that it covers before the first step."""
    return pipe.draw(noise(n, *pipe.generator.latent_shape, seed=seed))


def arguments(output_dir, **values):
    """A few steps with the guard off; `values` go on top."""
    plain = {
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "guard": False,
        "r1_every": 2,
        "ema_decay": 0.5,
        "seed": 0,
    }
    return GANConfig(output_dir=str(output_dir), **(plain | values))


def trained(pipe, args, data=None, **kwargs):
    """A trainer that has trained `pipe` in place."""
    trainer = GANTrainer(pipe, args, train_dataset=images() if data is None else data, **kwargs)
    trainer.train()
    return trainer


def players(trainer):
    """A copy of both players, the average and the path lengths."""
    return {name: value.detach().clone() for name, value in trainer.players().items()}


def finite(model):
    return all(value.isfinite().all() for value in model.state_dict().values())


class Watch(TrainerCallback):
    """Calls `look(event, step)` at every event of a step."""

    def __init__(self, look):
        self.look = look

    def on_step_begin(self, args, state, control, **kwargs):
        self.look("begin", state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.look("between", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.look("end", state.global_step)


class StyleGenerator(ModelMixin, ConfigMixin):
    """What StyleGAN2 has and DCGAN has not: a mapping network, a style per layer, a running mean of w, latents of two axes."""

    @register_to_config
    def __init__(self, sample_size: int = 8, channels: int = 1, latent_dim: int = 3, style_dim: int = 5):
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(2 * latent_dim, style_dim), nn.Softplus(), nn.Linear(style_dim, style_dim)
        )
        self.register_buffer("mean_style", torch.zeros(style_dim))
        self.constant = nn.Parameter(torch.randn(1, 4, sample_size, sample_size))
        self.modulations = nn.ModuleList([nn.Linear(style_dim, 4), nn.Linear(style_dim, 4)])
        self.convolutions = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, channels, 3, padding=1)])

    @property
    def latent_shape(self):
        return (2, self.config.latent_dim)

    def map_latents(self, latents, truncation=1.0):
        one = self.mapping(latents.flatten(1))
        if self.training:
            self.mean_style.lerp_(one.detach().mean(0).to(self.mean_style.dtype), 0.1)
        return self.mean_style.to(one.dtype).lerp(one, truncation).unsqueeze(1).repeat(1, 2, 1)

    def synthesize(self, styles):
        x = self.constant
        for modulate, convolve, style in zip(self.modulations, self.convolutions, styles.unbind(1), strict=True):
            x = torch.tanh(convolve(x * modulate(style)[:, :, None, None]))
        return x

    def forward(self, latents, truncation=1.0):
        styles = self.map_latents(latents, truncation)
        return GeneratorOutput(sample=self.synthesize(styles), styles=styles)


def style_pipeline(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GANPipeline(StyleGenerator().to(dtype), DCGANDiscriminator(8, 1, base_channels=4).to(dtype))


def plain_loop(pipe, data, args, *, processes=1, penalty=None, false_images=None):
    """`GANTrainer` without `Trainer`: two optimisers, a gradient for one player at a time, formulas as in the papers.

    Args:
        processes (`int`): whose batches and latents are put together, as data-parallel processes would have them.
        penalty (callable, *optional*): named parameters of the generator to what is added to its loss.
        false_images (callable, *optional*): step to images in place of so many drawn ones.

    Returns:
        Generator, discriminator, average and, for every step, the terms of the losses.
    """
    generator, discriminator = copy.deepcopy(pipe.generator).train(), copy.deepcopy(pipe.discriminator).train()
    generator.requires_grad_(True)
    average = copy.deepcopy(generator)
    dtype = generator.dtype

    def adam(player, rate):
        betas = (args.adam_beta1, args.adam_beta2)
        kind = torch.optim.AdamW if args.weight_decay else torch.optim.Adam
        return kind(player.parameters(), rate, betas, args.adam_epsilon, args.weight_decay)

    def move(player, optimizer, loss, clip=0.0):
        parameters = list(player.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()

    slow = args.discriminator_learning_rate
    optimizers = adam(generator, args.learning_rate), adam(discriminator, args.learning_rate if slow is None else slow)
    share = args.per_device_train_batch_size
    rows = []
    while len(rows) < args.max_steps * share * processes:
        passes = len(rows) // len(data)
        rows += torch.randperm(len(data), generator=seeded_generator("cpu", args.seed, passes)).tolist()

    def latents(step, turn, less=0):
        parts = []
        for process in range(processes):
            noise = seeded_generator("cpu", args.seed, process, step, turn)
            parts.append(torch.randn(share - less, *generator.latent_shape, generator=noise))
        return torch.cat(parts).to(dtype)

    path_mean, terms = 0.0, []
    for step in range(args.max_steps):
        taken = rows[step * share * processes : (step + 1) * share * processes]
        real = data[taken].to(dtype).requires_grad_(True)
        false = None if false_images is None else false_images(step).to(dtype)
        with torch.no_grad():
            drawn = generator(latents(step, 0, 0 if false is None else len(false))).sample
        drawn = drawn if false is None else torch.cat([drawn, false])
        judged, judged_drawn = discriminator(real).logits, discriminator(drawn).logits
        loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        loss = loss + F.binary_cross_entropy_with_logits(judged_drawn, torch.zeros_like(judged_drawn))
        term = {"discriminator_loss": loss, "score_real": judged.mean(), "score_drawn": judged_drawn.mean(), "r1": 0.0}
        if args.r1_weight and step % args.r1_every == 0:
            slope = torch.autograd.grad(judged.sum(), real, create_graph=True)[0]
            term["r1"] = args.r1_every * (slope**2).sum() / (2 * len(real))
            loss = loss + args.r1_weight * term["r1"]
        move(discriminator, optimizers[1], loss)

        styled = latents(step, 1).requires_grad_(True)  # where w is z, z is what the path lengths are of
        output = generator(styled)
        judged = discriminator(output.sample).logits
        loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        term["generator_loss"] = loss
        if args.path_length_weight and step % args.path_length_every == 0:
            noise = seeded_generator("cpu", args.seed, 0, step, 2)
            y = torch.randn(output.sample.shape, generator=noise, dtype=dtype) / output.sample[0, 0].numel() ** 0.5
            slope = torch.autograd.grad((output.sample * y).sum(), output.styles, create_graph=True)[0]
            lengths = slope.flatten(1).norm(dim=1)
            path_mean = 0.99 * path_mean + 0.01 * lengths.mean().item()
            term["path_length"] = args.path_length_every * ((lengths - path_mean) ** 2).mean()
            loss = loss + args.path_length_weight * term["path_length"]
        term["loss"] = loss
        if penalty is not None:
            loss = loss + penalty(dict(generator.named_parameters()))
        if step >= args.discriminator_warmup:
            move(generator, optimizers[0], loss, args.max_grad_norm)

        decay = min(args.ema_decay, (2 + step) / (11 + step))
        with torch.no_grad():
            for one, now in zip(average.parameters(), generator.parameters(), strict=True):
                one.copy_(decay * one + (1 - decay) * now)
            for one, now in zip(average.buffers(), generator.buffers(), strict=True):
                one.copy_(now)
        terms.append({name: float(torch.as_tensor(value).detach()) for name, value in term.items()})
    return generator, discriminator, average, terms


def check_equal(trainer, loop, **tolerance):
    """The trainer's players against the loop's."""
    tolerance = {"rtol": 1e-9, "atol": 1e-10} | tolerance
    pairs = zip((trainer.model.generator, trainer.model.discriminator, trainer.averaged), loop, strict=False)
    for player, expected in pairs:
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(player.state_dict()[name], value, **tolerance)
