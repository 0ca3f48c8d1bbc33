"""What it costs to observe influence: in training, by the sweep after it, and against other ways to per-example gradients.

    python benchmarks/influence_cost.py [--quick] [--sections training fidelity …] [--rounds 8] [--cpu-seconds]

One process. Language models are Llamas of `hf_unlearn.examples.opinions` on its instruction data, images are scikit-learn's digits.

Training: the trainers' own `training_step`, clipping and optimiser step, round by round in turns, so that a busy machine is
busy for all; times are medians of the rounds' ratios to stock `SFTTrainer`. A look at the targets' gradients is timed apart,
in units of stock steps, and with a look every k steps a step costs `seeing + look / k`; whole training loops check that sum.
Memory is the peak of the allocations that PyTorch's profiler sees in a step or a look, on top of what was there before it,
plus the targets' gradients that are held, above the peak of a stock step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from peft import LoraConfig
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn.examples.classifier import digits_model
from hf_unlearn.examples.opinions import opinion_data, opinion_llama, texts_of, train_tokenizer
from hf_unlearn.influence.config import FINEConfig, InfluenceConfig
from hf_unlearn.influence.in_run.ghost import GhostRecorder
from hf_unlearn.influence.in_run.layers import low_rank
from hf_unlearn.influence.sft import FINETrainer
from hf_unlearn.influence.trainer import InfluenceTrainer


HERE = Path(__file__).parent
NEVER = 10**9
clock = time.perf_counter
COMMON = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
    "use_cpu": True,
}
LAYERS = ["*.o_proj", "*.down_proj"]
LAST = {"small": ["*.layers.1.*", "*.layers.2.*"], "20M": ["*.layers.4.*", "*.layers.5.*"]}
RANK = 8
RANKS = [1, 2, 4, 8, 16, 32]
COUNTS = [1, 2, 4, 8]
EVERY = [1, 3, 10, 30]
TRAINING = {  # name: (LoRA, settings, targets); no settings: stock SFTTrainer
    "full: stock SFTTrainer": (False, None, 0),
    "full: head as a layer, nothing seen": (False, {}, 0),
    "full: all layers": (False, {}, 1),
    "full: o_proj and down_proj": (False, {"layers": LAYERS}, 1),
    "full: last two blocks": (False, {"layers": "last"}, 1),
    f"full: target_rank={RANK}": (False, {"target_rank": RANK}, 1),
    **{f"full: all layers, {count} targets": (False, {}, count) for count in COUNTS[1:]},
    f"full: target_rank={RANK}, 8 targets": (False, {"target_rank": RANK}, 8),
    "LoRA: stock SFTTrainer": (True, None, 0),
    "LoRA: all layers": (True, {}, 1),
    **{f"LoRA: all layers, {count} targets": (True, {}, count) for count in COUNTS[1:]},
}
LOOPS = [name for name, (_, _, count) in TRAINING.items() if count < 2 and "nothing" not in name]


class Language:
    """Instruction data, its tokenizer, and models and trainers for them."""

    def __init__(self, folder: str, size: str, target_examples: int):
        self.data, self.folder, self.made = opinion_data(400, 0.05), folder, 0
        self.size, self.target_examples = size, target_examples
        self.tokenizer = train_tokenizer(texts_of(self.data["train"]))

    def targets(self, count: int, examples: int | None = None) -> dict:
        rows = self.data["target"] if examples is None else self.data["target"].select(range(examples))
        return {f"target {index}": rows for index in range(max(1, count))}

    def trainer(self, lora: bool, settings: dict | None, targets: dict, *, batch: int, size: str = "", **options):
        self.made += 1
        common = COMMON | {"learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "max_steps": 1}
        common |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch} | options
        common["output_dir"] = f"{self.folder}/{self.made}"
        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
        rest = {"train_dataset": self.data["train"], "processing_class": self.tokenizer, "peft_config": adapter}
        model = opinion_llama(self.tokenizer, size or self.size)
        if settings and settings.get("layers") == "last":
            settings = settings | {"layers": LAST[self.size]}
        if settings is None:
            return SFTTrainer(model, SFTConfig(**common), **rest)
        return FINETrainer(model, FINEConfig(**(common | settings)), target_dataset=targets, **rest)


class Clock(TrainerCallback):
    """Seconds from the first step's beginning to the last one's end."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.started or clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = clock() - self.started


class Stepper:
    """A trainer after one real step, so that all it needs exists, taking more steps by hand."""

    def __init__(self, language: Language, name: str, batch: int):
        lora, settings, count = TRAINING[name]
        settings = (
            settings
            if settings is None
            else settings | {"target_every": NEVER, "target_batch_size": language.target_examples}
        )
        self.trainer = trainer = language.trainer(lora, settings, language.targets(count), batch=batch)
        self.clock, self.sees = Clock(), count > 0
        trainer.add_callback(self.clock)
        if settings is not None:
            trainer._open_step = lambda step: None
            trainer.train()
            del trainer._open_step
        else:
            trainer.train()
        if settings is not None and not self.sees:
            trainer._sees, trainer._open_step = lambda: False, lambda step: None
        if self.sees:
            trainer._ghost.attach()
            trainer._look_at_targets(0)
        trainer.model.train()
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        self.batches = self._batches()

    def _batches(self) -> Iterator[dict]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def step(self) -> None:
        trainer, batch = self.trainer, next(self.batches)
        items = trainer._get_num_items_in_batch([batch], trainer.args.device)
        trainer.training_step(trainer.model, batch, items)
        trainer._get_grad_norm(trainer.model, grad_norm=trainer._clip_grad_norm(trainer.model))
        trainer.optimizer.step()
        if isinstance(trainer, FINETrainer):
            trainer._close_step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1

    def look(self) -> None:
        self.trainer._look_at_targets(self.trainer.state.global_step)

    def loop(self, steps: int, every: int) -> float:
        """Seconds of a whole training loop, from its first step to its last."""
        trainer = self.trainer
        trainer.args.max_steps, trainer.args.target_every = steps, every
        trainer.train()
        return self.clock.seconds

    def held(self) -> int:
        """Bytes of the targets' gradients between looks."""
        gradients = (self.trainer._target_gradients or {}).values() if self.sees else ()
        tensors = [part for value in gradients for part in (value if isinstance(value, tuple) else (value,))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(function: Callable[[], object]) -> int:
    """Peak of the bytes allocated in a call above its beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = top = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def seconds(function: Callable[[], object]) -> float:
    started = clock()
    function()
    return clock() - started


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def stock_of(name: str) -> str:
    return name.split(":")[0] + ": stock SFTTrainer"


# Training, step by step


def measure_training(language: Language, names: list[str], rounds: int, looks: int, batch: int) -> dict:
    steppers = {name: Stepper(language, name, batch) for name in names}
    for stepper in steppers.values():
        stepper.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 else list(reversed(names)):
            times[name].append(seconds(steppers[name].step))
    look_ratios: dict[str, list[float]] = {name: [] for name in names if steppers[name].sees}
    for turn in range(looks):
        for name in look_ratios:
            if turn == 0 or TRAINING[name][2] == 1:  # a look at many targets is long enough by itself
                before, look, after = (
                    seconds(steppers[which].step) if which else seconds(steppers[name].look)
                    for which in (stock_of(name), None, stock_of(name))
                )
                look_ratios[name].append(2 * look / (before + after))
    peaks = {name: peak(stepper.step) for name, stepper in steppers.items()}
    rows = {}
    for name, stepper in steppers.items():
        stock = stock_of(name)
        size = sum(p.nbytes for p in stepper.trainer.model.parameters() if p.requires_grad)
        seeing = spread([own / plain for own, plain in zip(times[name], times[stock], strict=True)])
        row = {"targets": TRAINING[name][2], "trainable": size // 4, "seeing": seeing}
        row["milliseconds"] = 1000 * statistics.median(times[name])
        row["extra_memory_in_trainable"] = (stepper.held() + peaks[name] - peaks[stock]) / size
        if stepper.sees:
            row["held_in_trainable"] = stepper.held() / size
            if row["targets"] in (1, COUNTS[-1]):  # the old targets go before the new ones come
                held = stepper.held()
                peak(stepper.look)  # the profiler sees frees only of what it saw allocated
                row["extra_memory_of_look_in_trainable"] = (held + peak(stepper.look) - peaks[stock]) / size
            row["look_in_steps"] = statistics.median(look_ratios[name])
            row["time_ratio_by_target_every"] = {
                str(every): seeing["median"] + row["look_in_steps"] / every for every in EVERY
            }
        rows[name] = row
    return {
        "model": language.size,
        "batch": batch,
        "target_batch_size": language.target_examples,
        "rounds": rounds,
        "looks": looks,
        "rows": rows,
    }


def measure_loops(language: Language, names: list[str], rounds: int, steps: int, every: int, batch: int) -> dict:
    """Whole training loops, with their looks, against stock ones in turns."""
    steppers = {name: Stepper(language, name, batch) for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        order = names if turn % 2 else list(reversed(names))
        times = {name: steppers[name].loop(steps, every) for name in order}
        for name in names:
            ratios[name].append(times[name] / times[stock_of(name)])
    rows = {name: spread(values) for name, values in ratios.items()}
    return {
        "model": language.size,
        "batch": batch,
        "target_every": every,
        "steps": steps,
        "rounds": rounds,
        "rows": rows,
    }


# What is lost by choosing layers or a rank


def measure_fidelity(language: Language, steps: int, every: int, batch: int) -> dict:
    """Observations of one training run by several recorders at once, against those of all layers at full rank."""
    options = {"target_every": every, "target_batch_size": language.target_examples}
    trainer = language.trainer(False, options, language.targets(1), batch=batch)
    coefficients, own = [], trainer._observed
    trainer._observed = lambda coefficient: coefficients.append(coefficient.float()) or own(coefficient)
    last = LAST[language.size]
    observers = {"o_proj and down_proj": LAYERS, "last two blocks": last, "last block": last[1:]}
    recorders = {name: GhostRecorder(trainer.model, layers=layers) for name, layers in observers.items()}
    recorders |= {f"target_rank={rank}": GhostRecorder(trainer.model) for rank in RANKS}
    kept: dict[str, list[Tensor]] = {name: [] for name in ["all layers", *recorders]}
    errors: dict[int, list[float]] = {rank: [] for rank in RANKS}

    def look() -> None:
        gradients = trainer._target_gradients
        for name, recorder in recorders.items():
            targets = dict(gradients)
            if name.startswith("target_rank="):
                rank = int(name.split("=")[1])
                factors = {key: low_rank(targets[key], rank) for key in recorder.matrices}
                lost = sum((targets[key] - u @ v.mT).square().sum().item() for key, (u, v) in factors.items())
                whole = sum(gradient.square().sum().item() for gradient in gradients.values())
                errors[rank].append(lost / whole)
                targets |= factors
            recorder.set_targets(targets)

    def start(*args, **asked) -> None:
        if trainer.state.global_step % every == 0:
            look()
        for recorder in recorders.values():
            recorder.start(batch, targets=True)
        own_start(*args, **asked)

    own_start, trainer._ghost.start = trainer._ghost.start, start

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            size = coefficients[-1]
            for name, recorder in ({"all layers": trainer._ghost} | recorders).items():
                kept[name].append((recorder.dots / size[:, None])[:, 0])
            for recorder in recorders.values():
                recorder.stop()

    trainer.add_callback(Watch())
    trainer.args.max_steps = steps
    for recorder in recorders.values():
        recorder.attach()
    trainer.train()
    for recorder in recorders.values():
        recorder.detach()
    rows = {name: agreement(kept[name], kept["all layers"]) for name in recorders}
    for rank, lost in errors.items():
        rows[f"target_rank={rank}"]["lost_share_of_squared_norm"] = statistics.median(lost)
    return {
        "model": language.size,
        "steps": steps,
        "batch": batch,
        "target_every": every,
        "observations": steps * batch,
        "rows": rows,
    }


def agreement(own: list[Tensor], full: list[Tensor]) -> dict[str, float]:
    """Correlations over all observations, as they are and less the mean of their batch."""
    pairs = {"": (torch.cat(own), torch.cat(full))}
    pairs["_centred"] = tuple(torch.cat([step - step.mean() for step in side]) for side in (own, full))
    result = {}
    for suffix, (a, b) in pairs.items():
        result[f"pearson{suffix}"] = float(pearsonr(a.numpy(), b.numpy()).statistic)
        result[f"spearman{suffix}"] = float(spearmanr(a.numpy(), b.numpy()).statistic)
    return result


# The sweep after training


def digits_rows(count: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = {"pixel_values": torch.randn(count, 1, 16, 16, generator=generator).numpy()}
    rows["labels"] = torch.randint(0, 10, (count,), generator=generator).tolist()
    return datasets.Dataset.from_dict(rows).with_format("torch")


def measure_sweep(language: Language, counts: list[int], steps: int, rounds: int) -> dict:
    """Seconds of the sweep over those of the stock training run before it, per step taken."""
    rows, folder = digits_rows(512), f"{language.folder}/digits"

    def digits(count: int):
        common = COMMON | {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 32}
        common |= {"learning_rate": 1e-2, "optim": "sgd"}
        if not count:
            return Trainer(digits_model(), TrainingArguments(**common), train_dataset=rows)
        targets = {str(index): rows.select(range(32)) for index in range(count)}
        return InfluenceTrainer(digits_model(), InfluenceConfig(**common), train_dataset=rows, target_dataset=targets)

    def adapter(count: int):
        settings = {"observation": "propagated"} if count else None
        targets = language.targets(count, examples=8)
        return language.trainer(True, settings, targets, batch=8, size="small", max_steps=steps)

    result = {}
    for name, make in (("digits ResNet, batch 32, SGD", digits), ("Llama of 5 M, LoRA, batch 8, AdamW", adapter)):
        stock, swept = [], {count: [] for count in counts}
        training = {count: [] for count in counts}
        for _ in range(rounds):
            stock.append(timed_loop(make(0))[0])
            for count in counts:
                loop, sweep = timed_loop(make(count))
                training[count].append(loop / stock[-1])
                swept[count].append(sweep / stock[-1])
        result[name] = {
            str(count): {
                "training": statistics.median(training[count]),
                "sweep": statistics.median(swept[count]),
                "sweep_per_target": statistics.median(swept[count]) / count,
            }
            for count in counts
        }
    return {"steps": steps, "rounds": rounds, "rows": result}


def timed_loop(trainer: Trainer) -> tuple[float, float]:
    """Seconds of the training loop and of the sweep after it."""
    watch, swept = Clock(), [0.0]
    trainer.add_callback(watch)
    if isinstance(trainer, FINETrainer | InfluenceTrainer):
        propagate = trainer._propagate
        trainer._propagate = lambda: swept.append(seconds(propagate))
    trainer.train()
    return watch.seconds, swept[-1]


# Per-example gradients in other ways


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def image_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


class Products:
    """Dots of the examples' gradients with one target's, in several ways."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor], **options
    ):
        self.model, self.inputs, self.labels, self.loss, self.options = model.eval(), inputs, labels, loss, options
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(0)
        self.goals = {n: torch.randn(1, *p.shape, generator=generator) for n, p in self.parameters.items()}
        self.recorder = GhostRecorder(model)
        self.recorder.set_targets(self.goals)

    def losses(self) -> Tensor:
        """The sum over examples of their mean losses."""
        logits = self.model(self.inputs, **self.options).logits
        if self.loss is image_loss:
            return F.cross_entropy(logits, self.labels, reduction="sum")
        return self.loss(logits, self.labels) * len(self.inputs)

    def plain(self) -> None:
        self.losses().backward()
        self.model.zero_grad()

    def ghost(self) -> Tensor:
        with self.recorder as recorder:
            recorder.start(len(self.inputs), targets=True)
            self.plain()
            recorder.stop()
        return recorder.dots[:, 0]

    def vmapped(self) -> Tensor:
        def one(parameters: dict, x: Tensor, label: Tensor) -> Tensor:
            output = functional_call(self.model, parameters, (x[None],), self.options, tie_weights=True)
            return self.loss(output.logits, label[None])

        detached = {name: p.detach() for name, p in self.parameters.items()}
        gradients = vmap(grad(one), in_dims=(None, 0, 0))(detached, self.inputs, self.labels)
        return sum((gradients[n].flatten(1) @ self.goals[n].flatten(1).T)[:, 0] for n in gradients)

    def loop(self) -> Tensor:
        dots = []
        for x, label in zip(self.inputs.split(1), self.labels.split(1), strict=True):
            loss = self.loss(self.model(x, **self.options).logits, label)
            gradients = torch.autograd.grad(loss, list(self.parameters.values()))
            dots.append(sum((g * goal[0]).sum() for g, goal in zip(gradients, self.goals.values(), strict=True)))
        return torch.stack(dots)


def measure_products(language: Language, rounds: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(language.tokenizer), (8, 64), generator=generator)
    images, labels = torch.randn(32, 1, 16, 16, generator=generator), torch.arange(32) % 10
    workloads = {
        f"Llama, {language.size}, batch 8, 64 tokens": Products(
            opinion_llama(language.tokenizer, language.size), ids, ids, language_loss, use_cache=False
        ),
        "digits ResNet in eval mode, batch 32": Products(digits_model(), images, labels, image_loss),
    }
    result = {}
    for name, products in workloads.items():
        ways = {
            "forward and backward pass alone": products.plain,
            "ghost products": products.ghost,
            "vmap(grad)": products.vmapped,
            "loop over examples": products.loop,
        }
        right = products.ghost()
        rows: dict[str, dict] = {}
        for way, function in list(ways.items()):
            try:
                value = function()
            except Exception as error:  # torch.func cannot trace every model
                rows[way] = {"fails": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
                del ways[way]
                continue
            rows[way] = (
                {} if value is None else {"difference": ((value - right).abs().max() / right.abs().max()).item()}
            )
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds):
            for way in list(ways) if turn % 2 else list(reversed(ways)):
                times[way].append(seconds(ways[way]))
        size = sum(p.nbytes for p in products.parameters.values())
        first = times["forward and backward pass alone"]
        for way, function in ways.items():
            rows[way]["time_ratio"] = spread([own / plain for own, plain in zip(times[way], first, strict=True)])
            rows[way]["milliseconds"] = 1000 * statistics.median(times[way])
            rows[way]["peak_memory_in_parameters"] = peak(function) / size
        result[name] = rows
    return {"rounds": rounds, "rows": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under two minutes; writes nothing")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count this process's CPU time, where others use the machine too"
    )
    parser.add_argument("--sections", nargs="+", default=[], help="measure these alone; the others stay as they are")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    quick, rounds, by_cpu = arguments.quick, 2 if arguments.quick else arguments.rounds, arguments.cpu_seconds
    global clock
    clock = time.process_time if by_cpu else time.perf_counter
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    names = [name for name, (_, _, count) in TRAINING.items() if not quick or count < 2]
    loops = LOOPS[:3] if quick else LOOPS
    few, batch = max(1, rounds // 3), 4 if quick else 16
    with tempfile.TemporaryDirectory() as folder:
        language = Language(folder, "small" if quick else "20M", 8)
        about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        about |= {"clock": "CPU seconds" if by_cpu else "seconds"}
        sections = {
            "training": lambda: measure_training(language, names, rounds, few, batch),
            "fidelity": lambda: measure_fidelity(language, *((6, 3, 4) if quick else (40, 10, 8))),
            "sweep": lambda: measure_sweep(language, [1] if quick else COUNTS, 2 if quick else 8, 1),
            "products": lambda: measure_products(language, rounds),
            "loops": lambda: measure_loops(language, loops, few, 2 if quick else 10, 10, batch),
        }
        for section in arguments.sections or sections:
            begun = time.perf_counter()
            result = sections[section]() | about
            result["minutes"] = (time.perf_counter() - begun) / 60
            print(section, json.dumps(result, indent=1), flush=True)
            if not quick:
                save(section, result)


def save(section: str, result: dict) -> None:
    file = HERE / "results" / "influence_cost.json"
    file.parent.mkdir(exist_ok=True)
    whole = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(whole | {section: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
