"""Two processes where the rows do not divide, where one dies, and where a run goes on by another number of them."""

import json
import os
import signal

import launches
import pytest
import torch
from fresh import run_python
from safetensors.torch import load_file
from test_distributed import by_row
from trainers import arguments, check_same

from hf_unlearn.training.runs import MARKER, check_files


pytestmark = pytest.mark.slow  # seven launches
RUNS = launches.RUNS
DEATHS = [name for name, one in RUNS.items() if one.death]
REFUSED = {"shared to 1": "share the parameters (FSDP2), and this run does not", "2 to shared": "do not share the parameters (FSDP2), and this run does"}  # fmt: skip
GOES_ON = [name for name, one in RUNS.items() if one.resumes and name not in REFUSED]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("launches")
    run_python("import sys, launches; launches.run_all(sys.argv[1])", root, timeout=1200)
    return root


def read(root, name):
    return json.loads((root / f"{name}.json").read_text())


def ranks(root, name, what=""):
    return [read(root, f"{name}{what}-{rank}") for rank in range(max(1, RUNS[name].processes))]


def test_all_that_should_end_well_does(root):
    ends = read(root, "ends")
    assert {name: ends[name] for name in ends.keys() - set(DEATHS)} == {
        "alone": 0,
        "two": None,
        "one that shares": None,
    }


# Rows that do not divide


@pytest.mark.parametrize("job", launches.EVALUATED)
@pytest.mark.parametrize("size", launches.SIZES)
def test_what_is_evaluated_counts_once(job, size, root):
    """As by one process with batches of the same size. Noise is each process's own, so with several batches it is of others."""
    if job == "vdu" and size > 1:
        pytest.skip("other noise")
    first, second, alone = (read(root, f"evaluated{who}")[f"{job}, {size}"] for who in ("-0", "-1", ", alone-0"))
    assert first == second
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-5)
    if job == "unlearn":
        assert first["predicted"]["labels"] == alone["predicted"]["labels"]
        logits, expected = (torch.tensor(found["predicted"]["logits"]) for found in (first, alone))
        assert logits.shape == (size, 5)
        torch.testing.assert_close(logits, expected)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(first["predicted"]["labels"]))
        assert first["metrics"]["eval_loss"] == pytest.approx(first["predicted"]["loss"], rel=1e-5)
        assert first["metrics"]["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", launches.FEW)
def test_one_example_for_two_processes(name, root):
    """It is repeated, which changes no mean over a batch."""
    first, second = (read(root, f"few-{rank}")[name] for rank in (0, 1))
    assert first["step"] == second["step"] == 2
    assert first["after"] == second["after"]
    assert first["moved"] > 0
    if "records" in first:  # once a step, with all of its repetitions
        assert first["records"] == [[0, 1], [0, 0], [4.0, 4.0]]


# A process that dies


@pytest.mark.parametrize("name", DEATHS)
def test_the_others_end_and_the_last_checkpoint_is_whole(name, root):
    one, end = RUNS[name], read(root, "ends")[name]
    last = max(1, one.processes) - 1
    if one.processes == 0:
        assert end == -signal.SIGKILL
    elif str(last) in end:  # the launcher looks now and then, and names whoever it finds dead first
        code, message = end[str(last)]
        assert code == (1 if one.death.says else -signal.SIGKILL)
        assert (one.death.says or "SIGKILL") in message
    else:  # the other had noticed by then
        assert end["0"][0] != 0
    for rank in range(last + 1):
        with pytest.raises(ProcessLookupError):
            os.kill(read(root, f"{name}, process-{rank}"), 0)
    checkpoints = {path.name: path for path in (root / name).glob("checkpoint-*")}
    half = {"checkpoint-4"} if one.death.where == "checkpoint" else set()
    assert checkpoints.keys() == {"checkpoint-2"} | half
    assert [name for name, path in checkpoints.items() if (path / MARKER).is_file()] == ["checkpoint-2"]
    check_files(checkpoints["checkpoint-2"], json.loads((checkpoints["checkpoint-2"] / MARKER).read_text())["files"])


@pytest.mark.parametrize("name", GOES_ON)
def test_goes_on_by_as_many_processes_or_others(name, root):
    """And comes to the weights, and to the records, of one process that nothing happened to."""
    calm = "calm, in_run" if RUNS[name].job == "in_run" else "calm"
    start = load_file(root / f"{calm}.start.safetensors")
    assert [notes["step"] for notes in ranks(root, name)] == [6] * max(1, RUNS[name].processes)
    saved, expected = (load_file(root / run / "final" / "model.safetensors") for run in (name, calm))
    saved, expected = ({f"model/{key}": value for key, value in found.items()} for found in (saved, expected))
    check_same(saved, expected, start, exact=False)
    if RUNS[name].job == "in_run":
        found, whole = (by_row(load_file(root / f"{run}.safetensors")) for run in (name, calm))
        check_same(found, whole, start, exact=False)


@pytest.mark.parametrize("name", GOES_ON)
def test_no_row_of_an_epoch_is_left_out_or_seen_twice(name, root):
    before, after, calm = {}, {}, {}
    unbroken = "calm, in_run" if RUNS[name].job == "in_run" else "calm"
    for seen, run in ((before, RUNS[name].resumes), (after, name), (calm, unbroken)):
        for steps in ranks(root, run, ", seen"):
            for step, rows in steps.items():
                seen[int(step)] = sorted(seen.get(int(step), []) + rows)
    assert {step: rows for step, rows in before.items() if step < 2} | after == calm
    assert len({row for step in range(3) for row in calm[step]}) == launches.ROWS


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_share_and_those_that_do_not(name, root):
    for notes in ranks(root, name):
        assert REFUSED[name] in notes["error"]
        assert notes["error"].startswith("resume_from_checkpoint: ")
        assert notes["step"] == 0
        assert "\n" not in notes["error"]


# The command line


def test_the_command_in_processes_that_share(root):
    for rank in (0, 1):
        assert read(root, f"command-{rank}") == {"shares": 0, "fsdp 1": 1}
    kind = type(arguments("pbu")["model"])
    _, info = kind.from_pretrained(root / "cli", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    card = (root / "cli" / "README.md").read_text()  # with the class that the model had before
    assert 'AutoModelForImageClassification.from_pretrained("cli")' in card
    assert "FSDP" not in card
    said = [file.read_text() for file in root.glob("*/*/*/*/stderr.log")]
    assert sum("hf-unlearn: error: fsdp_version=1: flattens parameters; set it to 2" in text for text in said) == 2
