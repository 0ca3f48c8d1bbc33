"""What people type wrongly, over all verbs: one line, exit code 2, and not a file more or less.

Each is refused before a library is imported, but for those of the last class, which the trainer's own config refuses. What only models and
data can tell is in the files of the verbs, what Python's entry points refuse in `tests/contracts/test_refusals.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_unlearn import cli


RECIPE = "method: pbu\nmodel: digits\ndataset: digits\nforget_column: label\nforget_values: [3]\noutput_dir: out\n"
FILES = {
    "ok.yaml": RECIPE,
    "binary.yaml": b"\x00\x01\xff",
    "tab.yaml": "method: pbu\n\tmodel: digits\n",
    "list_of_methods.yaml": "method: [pbu]\n",
    "number.yaml": "1: 2\n",
    "anchor.yaml": "method: &a pbu\nmodel: *a\n",
    "latin.yaml": "method: pbu\nmodel: dïgits\n".encode("latin-1"),
    "file": "x",
}
UNLEARN = "method: missing; set it to one of pbu, unlearn, "

WRONG = [
    # The verb
    ("", "unknown verb ''; hf-unlearn --help lists them"),
    (" unlearn", "unknown verb ' unlearn'; did you mean 'unlearn'?"),
    ("unlearn" + "x" * 5000, "unknown verb 'unlearn" + "x" * 43 + "'; "),
    ("--dryrun", "unknown verb '--dryrun'; "),
    # The recipe
    ("unlearn|binary.yaml", "binary.yaml: is not text in UTF-8 (byte 2); save it as UTF-8"),
    ("unlearn|latin.yaml", "latin.yaml: is not text in UTF-8 (byte 20); save it as UTF-8"),
    ("unlearn|folder.yaml", "config: cannot read 'folder.yaml' (Is a directory); "),
    ("unlearn|tab.yaml", "tab.yaml: is not YAML (line 2: "),
    ("unlearn|anchor.yaml", "anchor.yaml: line 2: *a stands for another value; write it out"),
    ("unlearn|list_of_methods.yaml", "method: ['pbu'] is not one of pbu, "),
    ("unlearn|number.yaml", UNLEARN),
    ("unlearn|", "config: cannot read ''"),
    ("unlearn|pbu_digit", "config: cannot read 'pbu_digit' (No such file or directory); did you mean 'pbu_digits'?"),
    ("unlearn|filter_digits_gan", UNLEARN),
    ("influence|filter_digits_gan", "method: missing; set it to one of classifier, sft, attribute; or is it a recipe of hf-unlearn filter fit?"),
    ("influence|audit_digits", "method: missing; set it to one of classifier, sft, attribute; or is it a recipe of hf-unlearn audit?"),
    ("unlearn|influence_poison", "influence_poison: unknown key 'target_split'; "),
    ("influence|pbu_digits", "method: 'pbu' is not one of classifier, sft, attribute; it is one of hf-unlearn unlearn"),
    ("filter|fit|pbu_digits", "pbu_digits: unknown key 'method'; it is a recipe of hf-unlearn unlearn"),
    ("audit|attribute_digits", "attribute_digits: unknown key 'method'; it is a recipe of hf-unlearn influence"),
    ("filter|filter_digits_gan", "unknown verb 'filter filter_digits_gan'; say what to do with it, as in hf-unlearn filter fit "),
    ("demo|x", "config: cannot read 'x'"),
    # Keys
    ("unlearn|--", UNLEARN),
    ("unlearn|---x|1", UNLEARN),
    ("unlearn|--method|", "method: '' is not one of pbu, "),
    ("unlearn|ok.yaml|--method|redirect", "ok.yaml: unknown key 'dataset'; "),
    ("unlearn|ok.yaml|--learning_rate|", "learning_rate: '' is not allowed; expected float"),
    ("unlearn|ok.yaml|--learning_rate|fast", "learning_rate: 'fast' is not allowed; expected float"),
    ("unlearn|ok.yaml|--max_steps|1e3", "max_steps: '1e3' is not allowed; expected int"),
    ("unlearn|ok.yaml|--forget_values", "forget_values: has no value; write one behind it"),
    ("unlearn|ok.yaml|--forget_column", "forget_column: has no value; write one behind it"),
    ("unlearn|ok.yaml|--forget_weight|-1", "forget_weight=-1.0: must be > 0"),
    ("unlearn|ok.yaml|--forget_weight|nan", "forget_weight=nan: must be > 0"),
    ("unlearn|ok.yaml|--guard|perhaps", "guard: 'perhaps' is not allowed; expected bool"),
    ("unlearn|ok.yaml|--model|", "model: missing; "),
    ("unlearn|ok.yaml|--model|digits|opinions", "unexpected argument 'opinions'; "),
    ("unlearn|ok.yaml|--model|digits-gan", "model: 'digits-gan' is a model of another kind; set it to 'digits', "),
    ("unlearn|vdu_ddpm_digits|--model|digits", "model: 'digits' is a model of another kind; set it to 'digits-ddpm', "),
    ("unlearn|adapt_then_unlearn_digits|--model|facts", "model: 'facts' is a model of another kind; set it to 'digits-gan', "),
    ("unlearn|redirect_digits_t2i|--model|digits-ddpm", "model: 'digits-ddpm' is a model of another kind; set it to 'coloured-digits', "),
    ("influence|attribute_digits|--model|digits-gan", "model: 'digits-gan' is a model of another kind; set it to 'digits', "),
    ("filter|fit|filter_digits_gan|--pipeline|digits", "pipeline: 'digits' is a model of another kind; set it to 'digits-gan', "),
    ("unlearn|ok.yaml|--dataset|", "dataset: missing; "),
    ("unlearn|ok.yaml|--forget_ids|1", "forget_ids: given beside forget_column; keep one of them"),
    ("unlearn|ok.yaml|--forget_dataset|x", "forget_dataset: given beside forget_column; keep one of them"),
    ("unlearn|ok.yaml|--preset|papier", "preset='papier': must be one of paper"),
    ("unlearn|ok.yaml|--fisher|no", "fisher='no': must be one of exact, monte_carlo"),
    ("unlearn|ok.yaml|--☃|1", "unknown key '☃'; "),
    ("unlearn|vdu_ddpm_digits|--measure_samples|1", "measure_samples=1: must be ≥ 2"),
    ("unlearn|vdu_ddpm_digits|--pipeline|digits-ddpm", "unknown key 'pipeline'; did you mean 'model'?"),
    ("filter|fit|filter_digits_gan|--model|digits-gan", "unknown key 'model'; did you mean 'pipeline'?"),
    ("unlearn|adapt_then_unlearn_digits|--marks|0", "marks=0: must be ≥ 1"),
    ("unlearn|redirect_digits_t2i|--strength|nan", "strength=nan: must be > 0"),
    ("unlearn|redirect_digits_t2i|--seed|-1", "seed=-1: must be in [0, 4294967296)"),
    ("unlearn|redirect_digits_t2i|--device|tpu", "device='tpu': is none; "),
    ("influence|influence_labels_digits|--wrong_labels|nan", "wrong_labels=nan: must be in [0, 1)"),
    ("influence|influence_labels_digits|--top|0", "top=0: must be ≥ 1"),
    ("influence|influence_labels_digits|--model|opinions", "model: 'opinions' belongs to method 'sft', "),
    ("influence|influence_labels_digits|--target_split|test", "target_split: given beside target; keep one of them"),
    ("influence|attribute_digits|--damping|0", "damping=0.0: must be > 0"),
    ("influence|attribute_digits|--projection|0", "projection=0: must be ≥ 1"),
    ("influence|attribute_digits|--target|self", "target_split: given beside target; keep one of them"),
    ("influence|attribute_digits|--checkpoints_folder|x", "index_dir: given beside checkpoints_folder; keep one of them"),
    ("influence|attribute_digits|--num_train_epochs|2", "unknown key 'num_train_epochs'; "),
    ("estimate|attribute_digits", "method: 'attribute' takes no steps, or is none; give a recipe of unlearn, influence"),
    ("filter", "filter: say what to do: fit, run, evaluate; "),
    ("filter|fit|filter_digits_gan|--rate|nan", "rate=nan: must be in (0, 1)"),
    ("filter|fit|filter_digits_gan|--seed|-1", "seed=-1: must be in [0, 4294967296)"),
    ("filter|fit|filter_digits_gan|--undesired|3", "undesired: given beside marker; keep one of them"),
    ("filter|run|filter_digits_gan|--num_images|0", "num_images=0: must be ≥ 1"),
    ("filter|evaluate|filter_digits_gan|--samples|1", "samples=1: must be ≥ 2"),
    ("audit", "model: missing; "),
    ("audit|audit_digits|--checks", "checks: has no value; write one behind it"),
    ("audit|audit_digits|--retrain|-1", "retrain=-1: must be ≥ 0"),
    ("audit|audit_digits|--device|gpu", "device='gpu': is none; "),
    ("demo|--seed|99999999999999999999", "seed=99999999999999999999: must be in [0, 4294967296)"),
    # Folders
    ("demo|--output_dir|", "output_dir='': is empty; name a folder"),
    ("unlearn|ok.yaml|--output_dir|", "output_dir: missing; "),
    ("unlearn|ok.yaml|--output_dir|  ", "output_dir=' ': is blank; name a folder"),
    ("unlearn|ok.yaml|--output_dir|file", "output_dir: 'file' is a file; name a folder"),
    ("unlearn|ok.yaml|--output_dir|file/below", "output_dir: 'file' is a file; name a folder"),
    ("filter|fit|filter_digits_gan|--pipeline_dir|file", "pipeline_dir: 'file' is a file; name a folder"),
    ("filter|run|filter_digits_gan|--images_dir|file", "images_dir: 'file' is a file; name a folder"),
    ("audit|audit_digits|--output_dir|file", "output_dir: 'file' is a file; name a folder"),
    ("unlearn|redirect_digits_t2i|--output_dir|file", "output_dir: 'file' is a file; name a folder"),
    # What every verb takes
    ("unlearn|ok.yaml|--json|true", "unexpected argument 'true'; "),
    ("unlearn|ok.yaml|--json=yes", "--json: takes no value; write it alone"),
    ("unlearn|ok.yaml|--dry-run=true", "--dry-run: takes no value; write it alone"),
    ("unlearn|ok.yaml|--dry_run|--learning_rat|1", "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
    # Estimates and lists
    ("estimate", "config: missing; give a recipe, as in hf-unlearn estimate pbu_digits"),
    ("estimate|nowhere.yaml", "config: cannot read 'nowhere.yaml'"),
    ("estimate|audit_digits", "method: missing; give a recipe of unlearn, influence, filter fit"),
    ("estimate|redirect_sdxl", "method: 'redirect' takes no steps, or is none; give a recipe of "),
    ("estimate|--method|pbo", "method: 'pbo' takes no steps, or is none; "),
    ("estimate|pbu_digits|--modl|x", "unknown key 'modl'; did you mean 'model'?"),
    ("estimate|pbu_digits|stray", "unexpected argument 'stray'; "),
    ("estimate|filter_digits_gan|--rate|2", "rate=2.0: must be in (0, 1)"),
    ("estimate|influence_poison|--target|self", "target_split: given beside target; keep one of them"),
    ("list|pbu", "unexpected argument 'pbu'; hf-unlearn list takes none"),
]  # fmt: skip
# Only the libraries' configs know.
LATER = [
    (("--num_train_epochs", "0"), "num_train_epochs"),
    (("--per_device_train_batch_size", "0"), "per_device_train_batch_size"),
    (("--learning_rate", "nan"), "learning_rate"),
    (("--learning_rate", "-1"), "learning_rate"),
    (("--seed", "-1"), "seed"),
    (("--report_to", "wand"), "report_to='wand': must be all, none, or some of "),
    (("--seed", "99999999999999999999"), "seed"),
]


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_UNLEARN_DEBUG", raising=False)
    for name, content in FILES.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    Path("folder.yaml").mkdir()


def there():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def fails(capsys, words):
    before = there()
    capsys.readouterr()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert there() == before
    return out, line.removeprefix("hf-unlearn: error: ")


def test_there_are_many():
    assert len(WRONG) + len(LATER) >= 60
    assert {words.split("|")[0] for words, _ in WRONG} >= {*cli.VERBS} - {
        "publish",
        "verify",
        "app",
    }  # which have their own tests


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: value[:40].strip() or "blank")
def test_in_one_line(words, message, capsys):
    assert fails(capsys, words.split("|"))[1].startswith(message)


def test_no_library_is_imported_for_it():
    code = "import sys, io, contextlib; from hf_unlearn import cli\nwith contextlib.redirect_stderr(io.StringIO()):\n"
    code += "    codes = {cli.main(words.split('|')) for words in sys.argv[1:]}\n"
    code += "print(codes, sorted({'torch', 'transformers', 'numpy', 'rich', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *(words for words, _ in WRONG if "--json" not in words)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "{2} []\n", done.stderr


def test_for_machines(capsys):
    out, line = fails(capsys, ["unlearn", "ok.yaml", "--learning_rat", "1", "--json"])
    document = json.loads(out)
    assert (document["exit_code"], document["verb"], document["method"]) == (2, "unlearn", "pbu")
    assert document["error"] == line == "unknown key 'learning_rat'; did you mean 'learning_rate'?"


@pytest.mark.parametrize(("words", "key"), LATER)
def test_what_the_config_refuses(words, key, capsys):
    """Also without running: a dry run says it."""
    for more in ((), ("--dry_run",)):
        assert fails(capsys, ["unlearn", "ok.yaml", "--use_cpu", "true", *words, *more])[1].startswith(key)


def test_a_dry_run_says_what_is_not_there(capsys):
    before = there()
    assert cli.main(["unlearn", "ok.yaml", "--model", "./nowhere", "--dry_run", "--use_cpu", "true"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "hf-unlearn: error: model='./nowhere': not found"
    assert "Nothing was run or written." in out
    assert there() == before
