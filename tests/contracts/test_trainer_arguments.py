"""Every argument of the stock trainers with another value than its default: it works, is refused, or is said to do nothing.

`python tests/contracts/test_trainer_arguments.py`, with `tests` in the path as pytest has it, writes docs/trainer_arguments.md.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import TrainingArguments
from trl import SFTConfig


from trainers import JOBS, QUIET, build, images, own_images, pairs  # isort: skip


PAGE = Path(__file__).parents[2] / "docs" / "trainer_arguments.md"
FAMILIES = {
    "classifiers": "unlearn",
    "language": "sft",
    "diffusion": "vdu",
    "GANs": "gan",
    "influence": "in_run",
    "influence, language": "fine",
}
WORKS, REPORT, SCRIPT, MACHINE, NOTHING = "yes", "report", "script", "machine", "–"
LEGEND = {
    WORKS: "does what it does in the stock trainer",
    "refused": "a `ValueError` that names the argument, when the config or the trainer is made; why is told below",
    REPORT: "changes what is printed, logged or reported, and nothing else",
    SCRIPT: "read by training scripts, and not by a trainer",
    MACHINE: "passed on; means something with a GPU or several processes only, and has not been tried here",
    NOTHING: "has nothing to act on, or belongs to another config",
}


class Field(NamedTuple):
    """A value other than the default, what it means, and what has to be set beside it."""

    value: Any
    means: str = WORKS
    beside: dict[str, Any] = {}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}
WORKERS = {"dataloader_num_workers": 1}
EAGER = {"torch_compile_backend": "eager"}
STOCK = {
    "output_dir": Field("elsewhere"),
    "per_device_train_batch_size": Field(3),
    "num_train_epochs": Field(1.0, beside={"max_steps": -1}),
    "max_steps": Field(2),
    "learning_rate": Field(1e-3),
    "lr_scheduler_type": Field("cosine"),
    "lr_scheduler_kwargs": Field({"num_cycles": 1}, beside={"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": Field(1),
    "optim": Field("adamw_torch"),
    "optim_args": Field("rank=2"),
    "weight_decay": Field(0.1),
    "adam_beta1": Field(0.8),
    "adam_beta2": Field(0.9),
    "adam_epsilon": Field(1e-4),
    "optim_target_modules": Field(["q_proj"]),
    "gradient_accumulation_steps": Field(2),
    "average_tokens_across_devices": Field(False, MACHINE),
    "max_grad_norm": Field(0.5),
    "label_smoothing_factor": Field(0.1),
    "bf16": Field(True),
    "fp16": Field(True, MACHINE),
    "bf16_full_eval": Field(True),
    "fp16_full_eval": Field(True),
    "tf32": Field(False, MACHINE),
    "activation_checkpointing": Field(True),
    "activation_checkpointing_kwargs": Field({"use_reentrant": False}, beside={"activation_checkpointing": True}),
    "gradient_checkpointing": Field(True),
    "gradient_checkpointing_kwargs": Field({"use_reentrant": False}, beside={"gradient_checkpointing": True}),
    "torch_compile": Field(True, beside=EAGER),
    "torch_compile_backend": Field("eager"),
    "torch_compile_mode": Field("default", beside=EAGER),
    "use_liger_kernel": Field(True, MACHINE),
    "liger_kernel_config": Field({"rope": False}, MACHINE),
    "use_cache": Field(True, NOTHING),
    "neftune_noise_alpha": Field(5.0),
    "torch_empty_cache_steps": Field(1, MACHINE),
    "auto_find_batch_size": Field(True),
    "logging_strategy": Field("epoch", REPORT),
    "logging_steps": Field(1, REPORT, {"logging_strategy": "steps"}),
    "logging_first_step": Field(True, REPORT),
    "log_on_each_node": Field(False, REPORT),
    "logging_nan_inf_filter": Field(False, REPORT),
    "include_num_input_tokens_seen": Field("all", REPORT),
    "log_level": Field("error", REPORT),
    "log_level_replica": Field("error", REPORT),
    "disable_tqdm": Field(True, REPORT),
    "report_to": Field("none", REPORT),
    "run_name": Field("a run", REPORT),
    "project": Field("a project", REPORT),
    "trackio_space_id": Field("me/space", REPORT),
    "trackio_bucket_id": Field("me/bucket", REPORT),
    "trackio_static_space_id": Field("me/static", REPORT),
    "eval_strategy": Field("steps", beside={"eval_steps": 1}),
    "eval_steps": Field(1, beside=EVALUATED),
    "eval_delay": Field(1, beside=EVALUATED),
    "per_device_eval_batch_size": Field(2),
    "prediction_loss_only": Field(True, beside=EVALUATED),
    "eval_on_start": Field(True, beside=EVALUATED),
    "eval_do_concat_batches": Field(False, beside=EVALUATED),
    "eval_use_gather_object": Field(True, beside=EVALUATED),
    "eval_accumulation_steps": Field(1, beside=EVALUATED),
    "include_for_metrics": Field(["inputs", "loss"], beside=EVALUATED),
    "batch_eval_metrics": Field(True, beside=EVALUATED),
    "save_only_model": Field(True, beside=SAVED),
    "save_strategy": Field("steps", beside={"save_steps": 1}),
    "save_steps": Field(1, beside=SAVED),
    "save_on_each_node": Field(True, MACHINE),
    "save_total_limit": Field(1, beside=SAVED),
    "enable_jit_checkpoint": Field(True),
    "push_to_hub": Field(False),
    "hub_token": Field("token"),
    "hub_private_repo": Field(True),
    "hub_model_id": Field("me/model"),
    "hub_strategy": Field("every_save", beside={"push_to_hub": True}),
    "hub_always_push": Field(True),
    "hub_revision": Field("branch"),
    "load_best_model_at_end": Field(True, beside=EVALUATED | SAVED),
    "metric_for_best_model": Field("loss"),
    "greater_is_better": Field(False),
    "ignore_data_skip": Field(True),
    "restore_callback_states_from_checkpoint": Field(True),
    "full_determinism": Field(True),
    "seed": Field(3),
    "data_seed": Field(4),
    "use_cpu": Field(True),
    "accelerator_config": Field({"split_batches": True}),
    "parallelism_config": Field(object(), MACHINE),
    "dataloader_drop_last": Field(True, beside={"per_device_train_batch_size": 2}),
    "dataloader_num_workers": Field(1),
    "dataloader_pin_memory": Field(True, MACHINE),
    "dataloader_persistent_workers": Field(True, beside=WORKERS),
    "dataloader_prefetch_factor": Field(2, beside=WORKERS),
    "dataloader_multiprocessing_context": Field("fork", beside=WORKERS),
    "dataloader_in_order": Field(False),
    "remove_unused_columns": Field(False),
    "label_names": Field(["labels"]),
    "train_sampling_strategy": Field("group_by_length"),
    "length_column_name": Field("words"),
    "ddp_find_unused_parameters": Field(True, MACHINE),
    "ddp_bucket_cap_mb": Field(1, MACHINE),
    "ddp_broadcast_buffers": Field(True, MACHINE),
    "ddp_static_graph": Field(True, MACHINE),
    "ddp_backend": Field("gloo", MACHINE),
    "ddp_timeout": Field(10, MACHINE),
    "fsdp": Field("full_shard"),
    "fsdp_config": Field({"version": 2}, MACHINE),
    "deepspeed": Field("deepspeed.json"),
    "debug": Field("underflow_overflow"),
    "skip_memory_metrics": Field(False, REPORT),
    "do_train": Field(True, SCRIPT),
    "do_eval": Field(True, SCRIPT),
    "do_predict": Field(True, SCRIPT),
    "resume_from_checkpoint": Field("checkpoint-1", SCRIPT),
    "local_rank": Field(0, SCRIPT),
}
OF_SFT = {
    "model_init_kwargs": Field({"dtype": "float32"}),
    "trust_remote_code": Field(True),
    "router_aux_loss_coef": Field(0.1),
    "chat_template_path": Field("template.jinja"),
    "dataset_text_field": Field("words"),
    "dataset_kwargs": Field({"skip_prepare_dataset": False}),
    "dataset_num_proc": Field(1),
    "eos_token": Field("</s>"),
    "max_length": Field(32),
    "truncation_mode": Field("keep_end"),
    "shuffle_dataset": Field(True),
    "packing": Field(True),
    "packing_strategy": Field("wrapped", NOTHING),
    "padding_free": Field(True),
    "pad_to_multiple_of": Field(8),
    "eval_packing": Field(True),
    "completion_only_loss": Field(False),
    "assistant_only_loss": Field(True),
    "loss_type": Field("dft"),
    "activation_offloading": Field(True, MACHINE),
    "pad_token": Field("</s>"),
}
# What a trainer or a config refuses otherwise than by its table, by family, with the beginning of what it says.
BOUNDARIES = "packs examples into one row: their boundaries are needed"
BEST = "the guard restores the best state; leave it out, or set guard=False"
NO_TEXTS = "the examples are no texts, and have no lengths"
REFUSED_BY_TRAINER = {
    "classifiers": {
        "use_liger_kernel": "the kernels are for language models",
        "load_best_model_at_end": BEST,
        "dataloader_persistent_workers": "with a retain_dataset: would pair forget and retain examples once for all",
        "train_sampling_strategy": f"by length, of images: {NO_TEXTS}",
    },
    "language": {
        "use_liger_kernel": "where liger-kernel is not installed",
        "load_best_model_at_end": BEST,
        "packing": BOUNDARIES,
        "padding_free": BOUNDARIES,
        "eval_packing": BOUNDARIES,
        "loss_type": "the losses of unlearning are chosen by forget_loss",
        "activation_offloading": "where there is no GPU",
        "router_aux_loss_coef": "of a model without experts, as by SFTTrainer",
        "assistant_only_loss": "of examples that are no conversations, as by SFTTrainer",
    },
    "diffusion": {
        "load_best_model_at_end": f"{BEST}; with ema_decay",
        "train_sampling_strategy": f"by length: {NO_TEXTS}",
    },
    "GANs": {},
    "influence": {
        "train_sampling_strategy": f"by length, of images: {NO_TEXTS} (as by Trainer, when training begins)"
    },
    "influence, language": {
        "packing": BOUNDARIES,
        "padding_free": BOUNDARIES,
        "loss_type": "'dft', when training begins, unless per_example_loss is overridden",
        "activation_offloading": "where there is no GPU",
        "router_aux_loss_coef": "the load-balancing loss is of a whole batch, not of its examples",
        "assistant_only_loss": "of examples that are no conversations, as by SFTTrainer",
    },
}
for family in ("classifiers", "language", "diffusion", "GANs"):
    REFUSED_BY_TRAINER[family]["hub_strategy"] = "any but 'end': uploads half-finished weights"
for family in ("classifiers", "language", "diffusion", "influence", "influence, language"):
    REFUSED_BY_TRAINER[family]["dataloader_drop_last"] = "only where it would leave no batch"
NOT_THERE = {  # by family, what has nothing to act on
    "classifiers": {"average_tokens_across_devices": "losses are means of examples"},
    "language": {"average_tokens_across_devices": "losses are means of examples"},
    "diffusion": dict.fromkeys(
        ("average_tokens_across_devices", "label_names", "length_column_name", "eval_do_concat_batches"),
        "there are no tokens, labels or predictions",
    ),
    "GANs": dict.fromkeys(
        (
            "average_tokens_across_devices", "label_names", "length_column_name", "eval_do_concat_batches",
            "eval_use_gather_object", "per_device_eval_batch_size", "remove_unused_columns",
        ),
        "there are no tokens, labels or predictions; see batch_size",
    ),
    "influence": {},
    "influence, language": {},
}  # fmt: skip
SWEPT = {
    "load_best_model_at_end": "refused with observation='propagated': the sweep starts from the end of the run",
    "fp16": "refused with observation='propagated': its scaler skips steps",
}
NOTES = {
    "GANs": {"max_grad_norm": "clips the generator's gradient, not the discriminator's"},
    "influence": SWEPT,
    "influence, language": SWEPT,
}
SOMETIMES = {"dataloader_drop_last", "dataloader_persistent_workers"}  # refused for some data only: works elsewhere


def fields_of(family):
    return STOCK | (OF_SFT if "language" in family else {})


def refused(family):
    """Field → why."""
    config = JOBS[FAMILIES[family]].config
    return {k: v for k, v in (config.refused | REFUSED_BY_TRAINER[family]).items() if k in fields_of(family)}


def cell(family, name):
    if name not in fields_of(family):
        return NOTHING
    if name in refused(family):
        return WORKS + " ¹" if name in SOMETIMES else "refused"
    if name in NOT_THERE[family]:
        return NOTHING
    return fields_of(family)[name].means + (" ¹" if name in NOTES.get(family, {}) else "")


def page():
    lines = [
        "# Arguments of the stock trainers",
        "",
        "What the fields of `TrainingArguments` and `SFTConfig` do in the trainers of this package. Written by",
        "`tests/contracts/test_trainer_arguments.py`, which tries every one of them with another value than its default: in runs of",
        "two steps with classifiers, language models and GANs, and when the trainer is made with the others.",
        "",
        *(f"- **{word}**: {meaning}." for word, meaning in LEGEND.items()),
        "- **¹**: with a word below.",
        "",
        "PBU is a classifier's trainer; Adapt-then-Unlearn one of GANs.",
        "",
    ]
    for title, fields in (("`TrainingArguments`", STOCK), ("`SFTConfig` besides", OF_SFT)):
        lines += [f"## {title}", "", "| argument | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
        lines += [f"| `{name}` | " + " | ".join(cell(family, name) for family in FAMILIES) + " |" for name in fields]
        lines.append("")
    lines += ["## Why", ""]
    for family in FAMILIES:
        reasons = refused(family) | NOT_THERE[family] | NOTES.get(family, {})
        lines += [f"**{family}**", "", *(f"- `{name}`: {why}" for name, why in sorted(reasons.items())), ""]
    return "\n".join(lines).rstrip() + "\n"


def test_every_field_of_the_installed_libraries_is_in_the_table():
    of_stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert STOCK.keys() == of_stock
    assert OF_SFT.keys() == {field.name for field in dataclasses.fields(SFTConfig)} - of_stock
    for family in FAMILIES:  # no reason is left over from an earlier version
        assert (REFUSED_BY_TRAINER[family].keys() | NOT_THERE[family].keys()) <= fields_of(family).keys()
        assert not NOT_THERE[family].keys() & refused(family).keys()


def test_the_page_says_what_the_table_does():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_refuses(family, tmp_path):
    config = JOBS[FAMILIES[family]].config
    plain = QUIET | ({"bf16": False, "gradient_checkpointing": False} if "language" in family else {})
    for name in config.refused.keys() & fields_of(family).keys():
        with pytest.raises(ValueError, match=rf"^{name}[:=]") as error:
            config(**({"output_dir": str(tmp_path)} | plain | {name: fields_of(family)[name].value}))
        assert str(error.value).endswith(config.refused[name])
    assert not list(tmp_path.iterdir())


UNTRIED = (
    "output_dir",
    "push_to_hub",
    "trackio_space_id",
    "parallelism_config",
    "ddp_backend",
    "chat_template_path",
    "optim_args",
)
EVALUATION = {
    "gan": lambda: own_images(8),
    "vdu": lambda: images(3),
    "in_run": lambda: images(3, [0]),
    "sft": lambda: pairs(3),
    "fine": lambda: pairs(3),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument(family, tmp_path):
    """Refused, in one line that names it, exactly where the page says so; else a run of two steps of classifiers, language models and
    GANs; the other trainers are made.
    """
    job, told = FAMILIES[family], refused(family)
    for name, (value, _, beside) in fields_of(family).items():
        if name in UNTRIED or (name == "hub_strategy" and name not in told):
            continue
        changes = {"max_steps": 2} | beside | {name: value}
        if "eval_strategy" in changes and job in EVALUATION:
            changes["eval_dataset"] = EVALUATION[job]()
        expected = name in told and name != "dataloader_drop_last"
        late = (job, name) in (("in_run", "train_sampling_strategy"), ("fine", "loss_type"))
        folder = tmp_path / name
        said = None
        try:
            trainer = build(job, folder, **changes)
            if job in ("unlearn", "sft", "gan") or late:
                trainer.train()
        except ValueError as error:
            said = str(error)
        assert (said is not None) == expected, f"{name}: {said}"
        if said is not None and not late:
            assert "\n" not in said
            said = said.replace("gradient_", "activation_")
            assert any(key.replace("gradient_", "activation_") in said for key in (name, *beside))


if __name__ == "__main__":
    PAGE.write_text(page())
