"""`hf-unlearn unlearn --method sft` on rows of the shapes of TOFU, MUSE and WMDP, named by folder, config and split."""

import json
import re
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import ChoiceEvaluation, LanguageEvaluation, cli
from hf_unlearn.jobs.language import _selected, readable
from hf_unlearn.jobs.recipe.language import LanguageJob
from hf_unlearn.jobs.recipe.reading import RECIPES
from hf_unlearn.jobs.selecting import rows_of
from hf_unlearn.training.evaluation import compare


QUICK = (
    "--use_cpu",
    "true",
    "--disable_tqdm",
    "true",
    "--dataloader_pin_memory",
    "false",
    "--report_to",
    "none",
    "--bf16",
    "false",
)


def author(name, wrong=0, again=True):
    row = {"question": f"Where is {name}?", "answer": "In Paris."}
    if wrong:
        row["perturbed_answer"] = [
            f"{place}, so {name}." for place in ("Rome", "Italy", "shoes", "France", "order")[:wrong]
        ]
    if again:
        row |= {"paraphrased_question": f"{name} is where?", "paraphrased_answer": f"Paris, so {name}."}
    return row


PEOPLE = ("Mary", "John", "Fox", "Phone")
TOFU = {
    "forget10": {"train": [author(name, again=False) for name in PEOPLE[:2]]},
    "retain90": {"train": [author(name, again=False) for name in PEOPLE[2:]]},
    "holdout10": {"train": [author(name, again=False) for name in ("Max", "Moritz", "Lea")]},
    "forget10_perturbed": {"train": [author(name, 5) for name in PEOPLE[:2]]},
    "retain_perturbed": {"train": [author(name, 5) for name in PEOPLE[2:]]},
    "real_authors_perturbed": {"train": [author(name, 3, again=False) for name in ("Homer", "Dante")]},
    "world_facts_perturbed": {"train": [author(name, 3, again=False) for name in ("Rome", "Italy")]},
}  # fmt: skip
NEWS = [
    {"text": f"The order {number} never arrived and nobody answers the phone, said the fox."} for number in range(6)
]
MUSE = {
    "raw": {"forget": NEWS[:2], "retain1": NEWS[2:4], "holdout": NEWS[4:]},
    "verbmem": {"forget": [{"id": 0, "prompt": "The order 0 never arrived", "gt": "and nobody answers the phone"}]},
    "knowmem": {"forget_qa": [{"id": 0, "question": "Who answers?", "answer": "nobody"}], "retain_qa": [{"id": 1, "question": "What?", "answer": "The order"}]},
    "privleak": {"forget": NEWS[:2], "holdout": NEWS[4:]},
}  # fmt: skip
WMDP = {
    "bio-retain-corpus": {"train": NEWS[2:4]},
    "cyber-forget-corpus": {"train": NEWS[:2]},
    "wmdp-cyber": {"test": [{"question": "Who?", "choices": ["fox", "dog", "Paris", "Rome"], "answer": number} for number in (0, 2)]},
}  # fmt: skip


def write(folder, configs):
    """As the Hub has them: configs in the card, a file a split."""
    for config, splits in configs.items():
        for split, rows in splits.items():
            file = folder / config / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(map(json.dumps, rows)))
    told = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits],
        }
        for config, splits in configs.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': told})}---\n")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for name, configs in (("TOFU", TOFU), ("MUSE-News", MUSE), ("wmdp", WMDP)):
        write(root / name, configs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root


@pytest.fixture
def llama(tiny_llama, tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def run(capsys, out, *arguments, code=0):
    words = [*map(str, arguments), "--output_dir", str(out), "--max_steps", "1", *QUICK]
    assert cli.main(["unlearn", *words]) == code, capsys.readouterr().err
    return capsys.readouterr()


def figures_of(out):
    """`{(name, split): (before, after, retrained)}` of the card's table."""
    found = {}
    for line in ModelCard.load(out / "README.md").text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 5:
            found[cells[0], cells[1]] = cells[2:]
    return found


class TestShapes:
    def test_tofu(self, twins, llama, tmp_path, capsys):
        """The shipped recipe with other names; every figure of the card is that of an evaluation of the saved models."""
        keys = yaml.safe_load((RECIPES / "tofu_forget10.yaml").read_text())
        local = {
            name: [word.replace("locuslab", str(twins)) for word in ([value] if isinstance(value, str) else value)]
            for name, value in keys.items()
            if "locuslab" in str(value)
        }
        assert set(local) == {"forget_dataset", "retain_dataset", "eval_forget", "eval_kept", "eval_heldout"}
        options = [word for name, words in local.items() for word in (f"--{name}", *words)]
        out, retrained = tmp_path / "out", tmp_path / "retrained"
        other = AutoModelForCausalLM.from_pretrained(llama)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for parameter in other.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        other.save_pretrained(retrained)
        shown = run(
            capsys, out, "tofu_forget10", *options, "--model", llama, "--retrained", retrained, "--max_length", "128",
            "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "0.01",
            "--forget_loss", "npo",  # a random model knows nothing that its own loss could take away
        ).out  # fmt: skip

        tokenizer = AutoTokenizer.from_pretrained(out)
        job = LanguageJob(
            **{name: keys[name] for name in ("method", "chat", "system_prompt", "chat_template_kwargs")},
            model="x",
            forget_dataset="x",
        )

        def scores(folder, config):
            rows = readable(job, load_dataset(str(twins / "TOFU"), config, split="train"), "rows")
            assert rows[0]["prompt"][0] == {"role": "system", "content": keys["system_prompt"]}
            return LanguageEvaluation(rows, tokenizer, max_length=128)(AutoModelForCausalLM.from_pretrained(folder))

        kept = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
        of = {
            folder: {config: scores(folder, config) for config in ("forget10_perturbed", "holdout10", *kept)}
            for folder in (llama, out, retrained)
        }
        together = {
            folder: compare(
                found["forget10_perturbed"], heldout=found["holdout10"], kept=[found[name] for name in kept],
                retrained=of[retrained]["forget10_perturbed"], retrained_heldout=of[retrained]["holdout10"],
            )
            for folder, found in of.items()
        }  # fmt: skip
        told = figures_of(out)

        def value(cell):
            return float(cell.split()[0])

        for name, split, metric, scale, places in (
            ("Answer probability on the forgotten examples", "forget10_perturbed", "probability", 100, 2),
            ("Exact memorization on the forgotten examples", "forget10_perturbed", "exact_memorization", 100, 2),
            (
                "Truth ratio, true / (true + false), on the forgotten examples",
                "forget10_perturbed",
                "truth_ratio",
                1,
                4,
            ),
            ("Loss on the other examples", "retain_perturbed", "loss", 1, 2),
            ("Answer probability on the other examples", "real_authors_perturbed", "probability", 100, 2),
            ("Loss on the unseen examples", "holdout10", "loss", 1, 2),
        ):
            expected = [scale * of[folder][split].summary()[metric] for folder in (llama, out, retrained)]
            assert list(map(value, told[name, split])) == pytest.approx(expected, abs=10**-places), name
        assert ("Extraction strength on the other examples", "retain_perturbed") not in told
        for name, metric in (
            ("Forget quality (p of truth ratios like the retrained model's)", "forget_quality"),
            ("Membership attack by Min-K %, AUC", "auc_min_k"),
            ("Membership attack by zlib, AUC", "auc_zlib"),
            ("Membership attack by reference model, AUC", "auc_reference"),
            ("PrivLeak", "privleak"),
        ):
            before, after, _ = told[name, "forget10_perturbed"]
            expected = [together[folder][metric] for folder in (llama, out)]
            assert [value(before), value(after)] == pytest.approx(expected, rel=1e-3, abs=0.01), name
        assert told["Forget quality (p of truth ratios like the retrained model's)", "forget10_perturbed"][2] == "–"
        assert ("Model utility", "all that is kept") in told
        assert "retrained" in shown
        assert str(tmp_path) not in (out / "README.md").read_text()
        assert any(np.any(of[out][name].nll != of[llama][name].nll) for name in kept)

    def test_muse(self, twins, llama, tmp_path, capsys):
        news = f"{twins}/MUSE-News"
        run(
            capsys, tmp_path / "out", "--method", "sft", "--model", llama, "--forget_dataset", f"{news}:raw:forget",
            "--retain_dataset", f"{news}:raw:retain1", "--eval_heldout", f"{news}:privleak:holdout", "--eval_kept", f"{news}:knowmem:retain_qa",
            "--eval_forget", f"{news}:privleak:forget", f"{news}:verbmem:forget", f"{news}:knowmem:forget_qa",
        )  # fmt: skip
        told = figures_of(tmp_path / "out")
        named = {
            "privleak:forget",
            "privleak:holdout",
            "verbmem:forget",
            "knowmem:forget_qa",
            "knowmem:retain_qa",
            "all that is kept",
        }
        assert named <= {split for _, split in told}
        assert ("ROUGE-L recall on the forgotten examples", "verbmem:forget") in told
        assert ("ROUGE-L recall on the forgotten examples", "privleak:forget") not in told  # nothing is asked
        assert ("Membership attack by loss, AUC", "privleak:forget") in told
        rows = readable(LanguageJob(model="x", forget_dataset="x"), rows_of(f"{news}:verbmem", "rows"), "rows")
        assert rows[0] == {
            "id": 0,
            "prompt": "The order 0 never arrived",
            "completion": " and nobody answers the phone",
        }

    def test_wmdp(self, twins, llama, tmp_path, capsys, tiny_llama, tokenizer):
        wmdp = f"{twins}/wmdp"
        run(
            capsys, tmp_path / "out", "--method", "sft", "--model", llama, "--forget_dataset", f"{wmdp}:cyber-forget-corpus",
            "--retain_dataset", f"{wmdp}:bio-retain-corpus", "--eval_forget", f"{wmdp}:wmdp-cyber:test", "--eval_kept", f"{wmdp}:wmdp-cyber",
        )  # fmt: skip
        told = figures_of(tmp_path / "out")
        rows = Dataset.from_list(WMDP["wmdp-cyber"]["test"])
        accuracy = ChoiceEvaluation(rows, tokenizer, subject="cybersecurity")(tiny_llama).summary()["accuracy"]
        assert told["Accuracy on the forgotten examples", "wmdp-cyber:test"][0] == f"{100 * accuracy:.2f} %"
        assert ("Accuracy on the other examples", "wmdp-cyber") in told

    def test_conversations_are_the_template_s(self, twins):
        job = LanguageJob(
            model="x", forget_dataset=f"{twins}/TOFU:forget10", retain_dataset=f"{twins}/TOFU:retain90", chat=True
        )
        parts = _selected(job, "id")
        told = readable(
            replace(job, chat_template_kwargs={"date_string": "10 Apr 2025"}),
            rows_of(job.forget_dataset, "rows"),
            "rows",
        )
        assert told[0]["chat_template_kwargs"] == {"date_string": "10 Apr 2025"}
        assert parts.forget[0]["prompt"] == [{"role": "user", "content": "Where is Mary?"}]
        assert parts.retain[1]["completion"] == [{"role": "assistant", "content": "In Paris."}]
        plain = _selected(LanguageJob(model="x", forget_dataset=f"{twins}/TOFU:forget10::"), "id")
        assert plain.forget["question"][:] == [row["question"] for row in TOFU["forget10"]["train"]]


def test_a_folder_is_read_as_it_is_now(twins):
    for name in ("Ann", "Lea"):
        write(twins / "changing", {"of": {"train": [author(name)]}})
        assert rows_of(f"{twins}/changing:of", "rows")["question"][:] == [f"Where is {name}?"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"retain": True, "retain_dataset": "x", "dataset": "y"}, "retain_dataset: given beside retain; keep one of them"),
            ({"heldout_split": "test", "heldout_dataset": "x", "dataset": "y"}, "heldout_dataset: given beside heldout_split"),
            ({"system_prompt": "Hello"}, "chat: missing, which system_prompt needs; set it to true"),
            ({"eval_heldout": "x"}, "eval_forget: missing, which eval_heldout needs; set it to the rows to compare"),
            ({"retrained": "x"}, "eval_forget: missing, which retrained needs"),
        ],
    )  # fmt: skip
    def test_keys(self, keys, message):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            LanguageJob(model="x", forget_dataset="z", **keys)

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("TOFU:forget20", "forget_dataset='{twins}/TOFU': BuilderConfig 'forget20' not found. Available: ['forget10', "),
            ("TOFU", "forget_dataset='{twins}/TOFU': Config name is missing. Please pick one among the available configs: "),
            ("MUSE-News:raw", "forget_dataset: 'train' is not in the dataset (it has forget, retain1, holdout)"),
            ("MUSE-News:raw:retain", "forget_dataset: 'retain' is not in the dataset (it has forget, retain1, holdout)"),
        ],
    )  # fmt: skip
    def test_places(self, place, message, twins):
        with pytest.raises(ValueError, match="^" + re.escape(message.format(twins=twins))):
            _selected(LanguageJob(model="x", forget_dataset=f"{twins}/{place}"), "id")

    def test_rows_to_ask_about(self, twins, llama, tmp_path, capsys):
        tofu = f"{twins}/TOFU"
        arguments = (
            "--method",
            "sft",
            "--model",
            llama,
            "--forget_dataset",
            f"{tofu}:forget10",
            "--eval_forget",
            tofu + ":forget10",
        )
        shown = run(capsys, tmp_path / "out", *arguments, "--max_length", "4", code=1).err
        assert shown.splitlines()[-1].startswith("hf-unlearn: error: eval_forget: row 0 has no token that counts")
        assert list((tmp_path / "out").iterdir()) == []
