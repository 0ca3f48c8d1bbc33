"""A report as it leaves the process: JSON, the Hub's two formats, the page."""

import json
import math
import re
from dataclasses import replace

import pytest
import yaml
from fresh import run_python
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml, parse_eval_result_entries

from hf_unlearn.audit.report import AuditReport
from hf_unlearn.audit.residual import residual_mu
from hf_unlearn.audit.result import bare
from hf_unlearn.audit.run import audit


@pytest.fixture(scope="module")
def report(models, sets):
    return audit(
        models.originals[0], models.originals[1], models.retrained[:3], **sets, checks="quick", progress=False
    )


def test_another_process_reads_the_same(report, tmp_path):
    path = report.save(tmp_path / "audit.json")
    script = "import json, sys; from hf_unlearn.audit.report import AuditReport; print(json.dumps(AuditReport.load(sys.argv[1]).to_dict()))"
    told = run_python(script, path).stdout
    assert json.loads(told) == json.loads(path.read_text())
    assert AuditReport.load(path) == report


def test_infinite_numbers_are_read_by_strict_readers(report, tmp_path):
    """Of retrained models that all have one loss, every other loss is infinitely far."""
    endless = replace(report, residual=residual_mu(1.0, (2.0, 2.0, 2.0), original=3.0, checks=5))
    path = endless.save(tmp_path / "audit.json")

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    assert AuditReport.load(path) == endless
    assert (endless.residual.mu, endless.residual.original) == (math.inf, -math.inf)


def test_a_model_index_that_the_hub_reads(report):
    results = report.to_eval_results(dataset_type="me/digits", dataset_name="digits", task="image-classification")
    data = ModelCardData(model_name="without-3", eval_results=results)
    read = ModelCard(f"---\n{data.to_yaml()}\n---\n").data.eval_results
    assert {one.metric_type: one.metric_value for one in read} == {
        one.metric_type: one.metric_value for one in results
    }
    assert {one.metric_type for one in read} == {one.name for one in report.results} | {"residual_mu"}


def test_eval_results_that_the_hub_reads(report):
    entries = report.to_eval_entries("me/digits")
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), allow_unicode=True)
    assert parse_eval_result_entries(yaml.safe_load(text)) == entries
    assert len({one.task_id for one in entries}) == len(report.results)


def test_the_page_tells_every_check_and_asks_for_nothing(report, tmp_path):
    odd = replace(report, forgotten="<script>alert(1)</script>", skipped={"lens": "none & nothing"})
    page = odd.to_html(tmp_path / "audit.html").read_text()
    assert page.count('<th class="check" scope="row">') == len(report.results)
    assert page.count('data-of="status"') == len(report.results)
    assert "<script" not in page
    assert "none &amp; nothing" in page
    assert "3 models without a name" in page
    asked = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(one.startswith(("data:image/png;base64,", "https://arxiv.org/abs/")) for one in asked)
    named = replace(report, models={"audited": "me/b", "original": "me/a", "retrained 1": "c", "retrained 2": "d"})
    assert "<dt>retrained</dt><dd>c, d</dd>" in named.to_html(tmp_path / "named.html").read_text()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (-0.0001, "%", "+0.0"),
        (0.5, "%", "+50.0"),
        (-0.001, "AUC", "+0.00"),
        (0.0349, "AUC", "+0.03"),
        (3.2e7, "nats", "+3.2e+07"),
    ],
)
def test_numbers_as_they_are_shown(value, unit, text):
    assert bare(value, unit, signed=True) == text
