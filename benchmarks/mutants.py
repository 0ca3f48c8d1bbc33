"""How many deliberate bugs the tests notice: each is put into a copy of the sources, and the tests of its part are run on it.

    python benchmarks/mutants.py [--only WORD] [--jobs 1] [--into results/mutants.json]

A bug counts as caught if a test fails. The suite's share must not fall when the suite is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        file (`str`): below `hf_unlearn/`.
        right, wrong (`str`): text that occurs there, and what stands in its first place instead.
        tests (`tuple[str, ...]`): names of the test files that should notice, wherever they stand.
    """

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


def bug(file: str, right: str, wrong: str, *tests: str) -> Mutant:
    return Mutant(file, right, wrong, tests)


MUTANTS = [
    # ground
    bug("images.py", "high > most + ROUNDING", "high > most + 100", "test_images.py"),
    bug("files.py", "tensor.detach().clone() for name", "tensor.detach() for name", "test_parameters.py"),
    bug("data.py", "rows = sorted(_digest(row, key)", "rows = list(_digest(row, key)", "test_data.py"),
    bug("data.py", "digest.update(len(part).to_bytes(8, \"little\") + part)", "digest.update(part)", "test_data.py"),
    bug("modes.py", "    model.eval()\n", "    pass\n", "test_guard.py", "test_trainer.py"),
    bug("ensembles.py", "m.lerp_(g, 1 - beta1)", "m.lerp_(g, beta1)", "test_ensembles.py"),
    bug("tradeoff/curve.py", "return np.sqrt(np.square(np.asarray(mus, dtype=np.float64)).sum(axis))", "return np.asarray(mus, dtype=np.float64).sum(axis)", "test_tradeoff.py"),
    bug("tradeoff/estimate.py", "freedom / 2) - gammaln((freedom - 1) / 2)", "freedom / 2) - gammaln((freedom - 2) / 2)", "test_tradeoff.py"),
    bug("tradeoff/bootstrap.py", "(1 - 1 / width)", "(1 + 1 / width)", "test_tradeoff.py"),
    # parameters, metrics, hub
    bug("parameters/anchors.py", "alpha=2 * self.isotropic * scale", "alpha=self.isotropic * scale", "test_parameters.py"),
    bug("parameters/anchors.py", "value=2 * self.diagonal_weight * scale", "value=2 * self.diagonal_weight", "test_parameters.py"),
    bug("parameters/repulsion.py", "else -1 / d.square()", "else -1 / d", "test_repulsion.py"),
    bug("parameters/repulsion.py", "self.spread = self.spread / start", "pass", "test_repulsion.py"),
    bug("parameters/fisher.py", "return {name: total / len(inputs) for name, total in totals.items()}", "return totals", "test_fisher.py"),
    bug("parameters/moments.py", "squares / max(count - 1, 1)", "squares / max(count, 1)", "test_moments.py"),
    bug("metrics/generation.py", "kthvalue(k + 1)", "kthvalue(k)", "test_generation.py"),
    bug("metrics/generation.py", "low=float(100 * (1 - after_high / before_low))", "low=float(100 * (1 - after_high / before_high))", "test_generation.py"),
    bug("hub/allowed.py", "for inside in (path for path in folders if not path.is_symlink()):", "for inside in folders:", "test_publish.py", "test_publish_pipeline.py"),
    bug("hub/publish.py", "if not allow_adapter:", "if False:", "test_publish.py"),
    bug("hub/publish.py", "allow_patterns=as_patterns(files)", "allow_patterns=None", "test_publish.py"),
    bug("hub/adapters.py", "if layer.lora_bias[adapter]:", "if False:", "test_adapters.py"),
    # training and unlearning
    bug("training/losses.py", ".sum(1) / counted.sum(1).clamp(min=1)", ".mean(1)", "test_task.py"),
    bug("training/collators.py", "(self.seed << 20) + epoch", "(self.seed << 20)", "test_data.py"),
    bug("unlearning/losses.py", "beta * (reference_nll - nll)", "beta * (nll - reference_nll)", "test_losses.py"),
    bug("unlearning/losses.py", "return (loss.mean() - target).abs()", "return (loss - target).abs().mean()", "test_losses.py"),
    bug("unlearning/trainer.py", "scaler.get_scale() if scaled else 1.0", "1.0", "test_trainer.py", "test_peft.py"),
    bug("unlearning/trainer.py", "self.heldout_loss = self._resumed[\"heldout_loss\"]", "pass", "test_kill.py"),
    bug("unlearning/trainer.py", "with torch.random.fork_rng(self._random_devices):\n            return super().evaluate", "if True:\n            return super().evaluate", "test_trainer.py", "test_peft.py"),
    bug("unlearning/guard.py", "baseline - now if self.utility_kind == \"accuracy\" else now - baseline", "now - baseline", "test_guard.py"),
    bug("unlearning/saving.py", "Path(output_dir, \"training_args.bin\").unlink(missing_ok=True)", "pass", "test_saving.py"),
    bug("training/runs.py", "if about.get(\"method\") != self._method:", "if False:", "test_resume.py"),
    # language
    bug("unlearning/language/subject.py", "return whole[len(head) :] if whole[: len(head)] == head else alone", "return alone", "test_subject.py"),
    bug("unlearning/language/subject.py", "self.words.tokens(word.before + text + word.after)", "self.words.tokens(\" \" + text)", "test_subject.py"),
    bug("unlearning/language/subject.py", "2 * len(wanted) > len(here) > 1", "False", "test_subject.py"),
    bug("unlearning/language/asked.py", "pair.places[t] <= 0]", "pair.places[t] <= -2]", "test_asked.py"),
    bug("unlearning/language/asked.py", "max(some[place].places[t] - 1, 0)", "max(some[place].places[t], 0)", "test_asked.py"),
    bug("unlearning/language/targets.py", ".masked_fill(p == 0, 0)", "", "test_asked.py"),
    bug("training/answers.py", "\"repetition_penalty\", ", "", "test_written.py"),
    bug("unlearning/language/own_samples.py", "before.rstrip(\" \")", "before", "test_written.py"),
    bug("unlearning/language/redirect.py", "return self._by_token(self._kl(model, batch, self.kept), batch)", "return self._kl(model, batch, self.kept)", "test_redirect.py"),
    bug("unlearning/language/redirect.py", "return super()._is_over or bool(nothing)", "return super()._is_over", "test_redirect.py"),
    # diffusion
    bug("training/noise.py", "return -(alpha / sigma if", "return (alpha / sigma if", "test_noise.py"),
    bug("unlearning/diffusion/posterior.py", "- sizes[0] + sizes[1]", "+ sizes[0] - sizes[1]", "test_posterior.py"),
    bug("unlearning/diffusion/own_samples.py", "samples.select(~marked)", "samples.select(marked)", "test_own_samples.py"),
    bug("unlearning/diffusion/architecture.py", "answer[:, : noisy.shape[1]]", "answer[:, -noisy.shape[1] :]", "test_vdu_losses.py"),
    bug("unlearning/diffusion/saving.py", "forget_local_paths(folder)", "pass", "test_vdu_saving.py"),
    bug("unlearning/diffusion/saving.py", "self.decay, state.global_step)", "self.decay, state.global_step + 1)", "test_vdu_stability.py"),
    bug("unlearning/diffusion/saving.py", "if self.accept is not None and not self.accept():", "if False:", "test_vdu_stability.py"),
    bug("unlearning/diffusion/fused.py", "part.copy_(piece)", "pass", "test_denoiser.py"),
    bug("unlearning/diffusion/denoiser.py", "noise_scheduler = DDIMScheduler(**schedule)", "noise_scheduler = DDIMScheduler.from_config(noise_scheduler.config)", "test_denoiser.py"),
    bug("unlearning/diffusion/unets.py", "scale - 1.0", "scale", "test_denoiser.py"),
    bug("training/noise.py", "return -change / self.scales", "return change / self.scales", "test_architectures.py"),
    bug("unlearning/diffusion/diffusion_transformers.py", "layer.dropout_prob = 0.0", "pass", "test_architectures.py"),
    bug("unlearning/diffusion/objective.py", "(self.guidance if scale is None else scale) * (answer - unprompted)", "(answer - unprompted)", "test_vdu_stability.py"),
    bug("unlearning/diffusion/vdu.py", "len(self.forget_dataset) * (high - low)", "len(self.forget_dataset)", "test_vdu_losses.py"),
    bug("unlearning/diffusion/vdu.py", "neutral - eta *", "neutral + eta *", "test_vdu_losses.py"),
    bug("unlearning/diffusion/vdu.py", "of_guided = self._error(self.guide(answer, unprompted)", "of_guided = self._error(answer", "test_unprompted.py"),
    bug("unlearning/diffusion/unprompted.py", "unprompted - concept_share(", "unprompted + concept_share(", "test_unprompted.py"),
    bug("unlearning/gan/feedback.py", "check_marks(*(kind.detach()", "tuple((kind.detach()", "test_feedback.py"),
    # GANs
    bug("gan/losses.py", "return 0.5 * slope.square()", "return slope.square()", "test_gan_losses.py"),
    bug("gan/collapse.py", "look.coverage < trainer.args.collapse_tolerance * best", "look.coverage < 0", "test_gan_collapse.py"),
    bug("gan/saving.py", "| {\"path_mean\": self.path_mean}", "", "test_kill.py", "test_gan_resume.py"),
    bug("unlearning/gan/feedback.py", "scores >= high, scores < low", "scores >= low, scores < low", "test_marks.py"),
    bug("unlearning/gan/saving.py", "self.pipeline.register_modules(discriminator=None)", "pass", "test_adapt_then_unlearn.py"),
    # influence
    bug("influence/in_run/taps.py", "ys = [ys[0].sum(0, keepdim=True)]", "ys = [ys[0][:1]]", "test_ghost.py", "test_models.py"),
    bug("influence/propagated/optimizers.py", "momentum * state[1] + (1 - dampening) * d", "momentum * state[1] + d", "test_sweep.py"),
    bug("influence/propagated/sweep.py", "theta[:count] += self.targets.gradients(self.model, self.parameters) * share", "pass", "test_sweep.py", "test_influence_trainer.py"),
    bug("influence/report/shuffling.py", "(1 - 1 / len(examples))", "1", "test_shuffling.py"),
    bug("influence/report/report.py", "np.argsort(mu if harmful else -mu, kind=\"stable\")", "np.argsort(mu, kind=\"stable\")", "test_report.py"),
    bug("influence/report/report.py", "{\"helpful\": z, \"harmful\": -z, \"both\": np.abs(z)}", "{\"helpful\": z, \"harmful\": z, \"both\": np.abs(z)}", "test_report.py"),
    # filtering
    bug("filtering/scores.py", "ROWS = 512", "ROWS = 0", "test_scores.py"),
    bug("filtering/fitting/thresholds.py", "binom.cdf(j, samples, rate) > 1 - confidence", "binom.cdf(j, samples, rate) > 1", "test_thresholds.py"),
    bug("filtering/fitting/rates.py", "Rate(1 - self.value, 1 - self.high, 1 - self.low", "Rate(1 - self.value, 1 - self.low, 1 - self.high", "test_rates.py"),
    bug("filtering/drawing/actions.py", "whole = images.nan_to_num(0, 0, 0)", "whole = images", "test_actions.py"),
    bug("filtering/drawing/formats.py", "return images, least.isfinite() & most.isfinite()", "return images, torch.ones_like(least, dtype=torch.bool)", "test_filtered_pipeline.py"),
    # jobs and command line
    bug("jobs/recipe/methods.py", "of_recipe(path, keys, foreign, otherwise) | values", "values | of_recipe(path, keys, foreign, otherwise)", "test_cli.py"),
    bug("jobs/recipe/declared.py", "for kind in reversed(stub.__mro__[:-1])", "for kind in stub.__mro__[:-1]", "test_declared.py"),
    bug("examples/cache.py", "passed / (self.done - 1) * (self.steps - self.done)", "passed / self.done * self.steps", "test_cache.py"),
    bug("jobs/selecting.py", "if value not in gone", "if value in gone", "test_cli.py"),
    bug("jobs/judging.py", "100 * density_coverage(self.reference, drawn, k=NEIGHBOUR).coverage for drawn in (before, after)", "100 * density_coverage(self.reference, drawn, k=NEIGHBOUR).coverage for drawn in (after, before)", "test_judging.py"),
]  # fmt: skip


def outcome(mutant: Mutant, root: Path) -> str:
    """`"caught"`, `"missed"`, or what is wrong with the mutant."""
    source = root / "hf_unlearn" / mutant.file
    if not source.is_file() or mutant.right not in source.read_text():
        return "no such place"
    tests = [path.relative_to(root) for name in mutant.tests for path in (root / "tests").rglob(name)]
    if not tests:
        return "no such tests"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(
            root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", "docs")
        )
        path = copy / "hf_unlearn" / mutant.file
        path.write_text(path.read_text().replace(mutant.right, mutant.wrong, 1))
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            *map(str, tests),
        ]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1, 2):  # 2: a test file could not be imported, which is noticed too
        return f"pytest failed: {done.stdout[-300:]}"
    return "missed" if done.returncode == 0 else "caught"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout")
    parser.add_argument("--only", default="", help="mutants whose file holds this word")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--into", type=Path)
    given = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if given.only in mutant.file]
    found = []
    with ThreadPoolExecutor(given.jobs) as pool:
        results = pool.map(lambda mutant: outcome(mutant, given.root), chosen)
        for mutant, result in zip(chosen, results, strict=True):
            print(f"{result:8}  {mutant.file}: {mutant.right.strip()!r} → {mutant.wrong.strip()!r}", flush=True)
            found.append(asdict(mutant) | {"result": result})
            if given.into:
                given.into.write_text(json.dumps(found, indent=1))
    caught = sum(one["result"] == "caught" for one in found)
    print(f"{caught} of {len(found)} caught")


if __name__ == "__main__":
    main()
